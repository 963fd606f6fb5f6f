"""Online and iterative DPO: rounds of sampling from the current policy, labeling, pairing and optimizer steps."""
