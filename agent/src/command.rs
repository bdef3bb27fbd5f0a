//! The command line: one module per subcommand of `keelson`.

pub mod agent;
