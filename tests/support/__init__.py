"""What several test files share: problems, tables of laws and transformations, programs."""
