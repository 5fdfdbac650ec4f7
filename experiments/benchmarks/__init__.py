"""Speed tests, compared with other libraries."""
