"""Speed tests, each beside its peers."""
