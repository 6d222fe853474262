"""Work: time passes, record rollouts, fit, search, replay, judge. What is measured comes as an argument."""
