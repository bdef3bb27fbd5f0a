//! `cargo xtask soak`: bad days, one after the other.

use std::process::Command;

use anyhow::{Result, bail};

use crate::build::{self, Profile};
use crate::{install, shell};

#[derive(clap::Args)]
pub(crate) struct SoakArgs {
    /// How many things go wrong, over all modes of the service proxy
    #[arg(long, default_value_t = 200)]
    rounds: u32,
}

pub(crate) fn run(args: &SoakArgs) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("soak needs root: namespaces, cgroups, containerd");
    }
    install::for_soak()?;
    let bin = build::node_programs(Profile::Release)?;
    shell::run(build::cargo("build", Profile::Release).args(["-p", "keelson-tests", "--bins"]))?;
    let mut soak = Command::new(bin.join("keelson-soak"));
    soak.env("KEELSON_BIN_DIR", &bin).args(["--rounds", &args.rounds.to_string()]);
    shell::run(&mut soak)
}
