"""The commands of `concat-ensemble`: each module holds some, and how they print."""
