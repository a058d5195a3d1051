"""The family under the names and rules of other frameworks; each file is imported by its users."""
