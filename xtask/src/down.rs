//! `cargo xtask down`: what `cargo xtask up` made is gone again.

use std::process::Command;

use anyhow::{Result, bail};

use crate::build;
use crate::shell;

#[derive(clap::Args)]
pub(crate) struct DownArgs {}

pub(crate) fn run(_args: &DownArgs) -> Result<()> {
    let program = build::target_dir().join("release/keelson");
    if !program.is_file() {
        bail!(
            "{} is not there: was the node started with `cargo xtask up` from this folder?",
            program.display()
        );
    }
    shell::run(Command::new(program).arg("down"))
}
