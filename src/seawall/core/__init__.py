"""The mechanism: what a policy is, and how a row of them is run around a call. Knows no concrete policy."""
