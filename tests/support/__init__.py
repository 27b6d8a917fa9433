"""What several test files share: problems, tables of laws and of transformations, processes."""
