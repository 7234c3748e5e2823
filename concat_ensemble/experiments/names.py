"""Names of the experiments, for command lines: importing this module loads neither torch nor matplotlib."""

SHIFTS = ("spurious", "domains", "long-tail")
FIGURES = (
    "figure-6",
    "figure-1",
    "proposition-2.1",
    "figure-2",
    "figure-4",
    "figure-5",
    "figure-5-vit",
    "ntk",
    "saturation",
    *SHIFTS,
)
MINUTES = 47  # that all of them take at most on two cores; docs/reproduction.md has the measured ones
STUDIES = ("scattered_digits", "scattered_mnist")  # of mixture, budget_curve and ntk_gap
COMPONENTS = ("labels", "classes")  # of a mixture
