//! `keelson`: the node side of Kubernetes in one program.

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use keelson_agent::command;
use tracing_subscriber::EnvFilter;

#[derive(Parser)]
#[command(name = "keelson", version, about = "The node side of Kubernetes in one program")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Up(Box<command::up::UpArgs>),
    Down(command::up::DownArgs),
    Agent(Box<command::agent::AgentArgs>),
    Image(command::image::ImageArgs),
    #[command(hide = true)]
    Logd(command::logd::LogdArgs),
}

fn main() -> ExitCode {
    keelson_agent::memory::few_arenas();
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The one place where an error of the whole program ends: with its causes, for a person.
            drop(writeln!(std::io::stderr(), "keelson: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    // Whoever makes a TLS connection later finds the one provider that is compiled in.
    drop(rustls::crypto::ring::default_provider().install_default());
    match cli.command {
        Command::Up(args) => {
            log_at(args.verbosity());
            args.run()
        }
        Command::Down(args) => {
            log_at(0);
            args.run()
        }
        Command::Agent(args) => {
            log_at(args.verbosity());
            runtime()?.block_on(args.run())
        }
        Command::Image(args) => {
            // What the node would say of itself is of no interest here.
            log_from("warn");
            runtime()?.block_on(args.run())
        }
        Command::Logd(args) => {
            log_at(0);
            args.run()
        }
    }
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()
}

/// `RUST_LOG` beats `-v`.
fn log_at(verbosity: u8) {
    let default = match verbosity {
        0 => "info",
        1..=2 => "info,keelson_agent=debug,keelson_proxy=debug,keelson_standalone=debug",
        3..=4 => "debug",
        _ => "trace",
    };
    log_from(default);
}

fn log_from(default: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(ansi)
        .init();
    keelson_supervise::log_panics();
}
