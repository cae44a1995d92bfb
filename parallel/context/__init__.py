"""Context parallelism: ranks share the columns of every row; attention brings them together."""
