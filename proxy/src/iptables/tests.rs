//! Golden tests of the rules, and the real programs in network namespaces of the test's own.
