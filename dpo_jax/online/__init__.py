"""Online and iterative DPO: rounds of sampling from the current policy, labelling, pairing and optimizer steps."""
