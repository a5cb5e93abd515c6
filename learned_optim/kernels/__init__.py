"""Fast paths of the update rule. Each does in place what `learned_optim.rule.update` defines, and is compared with it."""
