"""What tests of several files share: comparisons, small data sets and networks, servers, and runs in processes."""
