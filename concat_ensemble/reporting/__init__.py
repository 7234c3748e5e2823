"""Tables, figures, cards and pages, made from results files alone."""
