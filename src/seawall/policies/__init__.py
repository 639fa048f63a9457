"""The policies, one file each. No policy imports another."""
