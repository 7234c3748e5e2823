"""The Hub payload, uploaded unchanged to every ensemble's repo. A bare `import modeling` makes other classes."""
