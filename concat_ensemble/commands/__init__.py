"""The commands of `concat-ensemble`, a module each. Each imports heavy libraries when it runs: `--help` is fast."""
