"""The Hub payload, uploaded unchanged to every ensemble's repo. Import it as `concat_ensemble.modeling`, never as
`modeling`: that makes second, different classes.
"""
