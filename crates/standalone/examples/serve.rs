//! Runs the embedded control plane alone: for tests, and to try it.
//!
//! `cargo run -p keelson-standalone --example serve -- --data-dir /tmp/x --port 16443 [--no-controllers]`
#![allow(clippy::print_stdout, reason = "an example talks to its user")]

use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;

use anyhow::Context as _;
use keelson_standalone::StandaloneConfig;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let (mut data_dir, mut port, mut controllers) = (None, 16_443_u16, true);
    let mut args = std::env::args().skip(1);
    while let Some(flag) = args.next() {
        let mut value = || args.next().with_context(|| format!("{flag} needs a value"));
        match flag.as_str() {
            "--data-dir" => data_dir = Some(PathBuf::from(value()?)),
            "--port" => port = value()?.parse().context("--port is a number")?,
            "--no-controllers" => controllers = false,
            other => anyhow::bail!("unknown flag {other}"),
        }
    }
    let data_dir = data_dir.context("--data-dir is missing")?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))
        .with_context(|| format!("cannot listen on port {port}"))?;
    let port = listener.local_addr()?.port();
    let mut config = StandaloneConfig::new(data_dir, vec![listener]);
    config.port = port;
    config.controllers = controllers;
    let plane = keelson_standalone::start(config).await?;
    println!("serving {} kubeconfig {}", plane.server_url(), plane.admin_kubeconfig().display());
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        _ = terminate.recv() => {}
        interrupted = tokio::signal::ctrl_c() => interrupted?,
    }
    plane.shutdown().await;
    Ok(())
}
