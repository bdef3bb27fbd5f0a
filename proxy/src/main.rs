//! keelson-proxy: kube-proxy's place taken.

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use keelson_proxy::cleanup;
use keelson_proxy::flags::{Cleanup, Flags};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let flags = Flags::parse();
    let level = match flags.v {
        0 => "warn",
        1..=3 => "info",
        4 | 5 => "keelson_proxy=debug,info",
        _ => "keelson_proxy=trace,debug",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let colours = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours);
    log.with_writer(std::io::stderr).init();
    match run(flags) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(flags: Flags) -> anyhow::Result<()> {
    match flags.cleanup {
        None | Some(Cleanup::Nothing) => {}
        Some(Cleanup::Everything) => return Ok(cleanup::everything()?),
        Some(Cleanup::KubeProxy) => return Ok(cleanup::kube_proxy()?),
    }
    let (config, warnings) = flags.resolve()?;
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    // Two watches and two small servers need no second thread; the engine has its own.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let shutdown = CancellationToken::new();
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let proxy = keelson_proxy::run_with(config, shutdown.clone(), || {
            if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
                tracing::warn!(%error, "Cannot tell systemd that we are ready");
            }
        });
        tokio::pin!(proxy);
        tokio::select! {
            result = &mut proxy => return result,
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        shutdown.cancel();
        proxy.await
    })
}
