//! keelson-proxy: kube-proxy's place taken.

use std::io::{BufWriter, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{Parser, Subcommand};
use keelson_proxy::cleanup;
use keelson_proxy::ebpf::{MonitorArgs, monitor};
use keelson_proxy::explain::Question;
use keelson_proxy::flags::{Cleanup, Flags};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// keelson's service proxy: takes kube-proxy's place.
#[derive(Parser)]
#[command(name = "keelson-proxy", version)]
struct Command {
    #[command(flatten)]
    flags: Flags,
    #[command(subcommand)]
    task: Option<Task>,
}

#[derive(Subcommand)]
enum Task {
    /// Show what is programmed for a Service and why, or where a packet would go
    Explain(Question),
    /// Mode ebpf: show each decision about connections, until interrupted
    Monitor(MonitorArgs),
}

fn main() -> ExitCode {
    let Command { flags, task } = Command::parse();
    let level = match (flags.v, &task) {
        // The answer is what is wanted.
        (2, Some(_)) => "error",
        (level, _) => level_name(level),
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let colours = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours);
    log.with_writer(std::io::stderr).init();
    keelson_supervise::log_panics();
    let done = match task {
        None => run(flags),
        Some(Task::Explain(question)) => explain(flags, &question),
        Some(Task::Monitor(wanted)) => show_decisions(flags, &wanted),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn level_name(level: u8) -> &'static str {
    match level {
        0 => "warn",
        1..=3 => "info",
        4 | 5 => "keelson_proxy=debug,info",
        _ => "keelson_proxy=trace,debug",
    }
}

fn show_decisions(flags: Flags, wanted: &MonitorArgs) -> anyhow::Result<()> {
    static INTERRUPTED: AtomicBool = AtomicBool::new(false);
    let (config, _) = flags.resolve()?;
    // What the programs are told must be taken back.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.spawn(async {
        let (Ok(mut terminate), Ok(mut interrupt)) =
            (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
        else {
            return;
        };
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        INTERRUPTED.store(true, Ordering::Relaxed);
    });
    let stop = || INTERRUPTED.load(Ordering::Relaxed);
    let mut out = BufWriter::new(std::io::stdout().lock());
    match monitor(&config.ebpf, config.metrics_address, wanted, &mut out, stop) {
        // Who reads has seen enough.
        Err(error) if is_broken_pipe(&error) => Ok(()),
        done => done,
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let cause = error.downcast_ref::<std::io::Error>();
    cause.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

fn explain(flags: Flags, question: &Question) -> anyhow::Result<()> {
    let (config, _) = flags.resolve()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let answer = runtime.block_on(keelson_proxy::explain::explain(&config, question))?;
    std::io::stdout().write_all(answer.as_bytes())?;
    Ok(())
}

fn run(flags: Flags) -> anyhow::Result<()> {
    match flags.cleanup {
        None | Some(Cleanup::Nothing) => {}
        Some(Cleanup::Everything) => return Ok(cleanup::everything(&flags.ebpf.config(None))?),
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
