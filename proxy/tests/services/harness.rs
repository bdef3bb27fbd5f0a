//! Runs rows against backends, and prints the table of behaviour x backend.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, panic_any};
use std::process::ExitCode;
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use keelson_netlink::netns::Netns;
use keelson_proxy::backend::Mode;
use keelson_proxy::ebpf::XdpChoice;

/// One behaviour.
#[derive(Clone, Copy)]
pub(crate) struct Row {
    /// Module path and name.
    pub(crate) name: &'static str,
    pub(crate) run: fn(Mode),
}

/// Lists the rows of a file.
macro_rules! rows {
    ($($name:ident),* $(,)?) => {
        pub(crate) const ROWS: &[$crate::harness::Row] = &[$($crate::harness::Row {
            name: concat!(module_path!(), "::", stringify!($name)),
            run: $name,
        }),*];
    };
}
pub(crate) use rows;

/// Ends a row that cannot be tried with this backend on this machine; the table tells why.
pub(crate) fn skip(why: impl Into<String>) -> ! {
    panic_any(Skipped(why.into()))
}

struct Skipped(String);

/// The backends that this kernel can do; the others come with the reason.
pub(crate) fn backends() -> (Vec<Mode>, Vec<(Mode, String)>) {
    let (mut able, mut unable) = (Vec::new(), Vec::new());
    for mode in Mode::ALL {
        match Netns::anonymous().unwrap().run(|| mode.probe()).unwrap() {
            Ok(()) => able.push(mode),
            Err(error) => unable.push((mode, keelson_proxy::switch::with_sources(&error))),
        }
    }
    (able, unable)
}

/// How long nothing must come for it to count as silence.
pub(crate) fn silence() -> Duration {
    *SILENCE.get_or_init(|| Duration::from_secs(1))
}

static SILENCE: OnceLock<Duration> = OnceLock::new();

/// Whether nodes of mode ebpf forward frames at XDP.
pub(crate) fn xdp() -> XdpChoice {
    *XDP.get_or_init(|| XdpChoice::Off)
}

static XDP: OnceLock<XdpChoice> = OnceLock::new();

/// How many random histories are tried.
pub(crate) fn histories() -> u32 {
    *HISTORIES.get_or_init(|| 40)
}

static HISTORIES: OnceLock<u32> = OnceLock::new();

#[derive(Default)]
struct Options {
    filters: Vec<String>,
    without: Vec<String>,
    backends: Vec<String>,
    exact: bool,
    list: bool,
    threads: Option<usize>,
}

/// The options of libtest that make sense here, and our own.
fn options() -> Options {
    let mut options = Options::default();
    let mut arguments = std::env::args().skip(1).flat_map(|argument| {
        let parts: Vec<String> = match argument.split_once('=') {
            Some((name, value)) if name.starts_with("--") => vec![name.into(), value.into()],
            _ => vec![argument],
        };
        parts
    });
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| panic!("{argument} needs a value"));
        match &*argument {
            "--exact" => options.exact = true,
            "--list" => options.list = true,
            "--skip" => options.without.push(value()),
            "--backend" => options.backends.push(value()),
            "--test-threads" => options.threads = Some(value().parse().expect("a number")),
            // Longer where the machine is slow: an answer that comes later counts as silence.
            "--silence-ms" => {
                let millis = value().parse().expect("milliseconds");
                SILENCE.get_or_init(|| Duration::from_millis(millis));
            }
            // For all rows that ask for nothing else.
            "--ebpf-xdp" => {
                let choice = XdpChoice::from_str(&value(), false).expect("a mode");
                XDP.get_or_init(|| choice);
            }
            "--histories" => {
                let number = value().parse().expect("a number");
                HISTORIES.get_or_init(|| number);
            }
            // Libtest's, without a meaning here.
            "--nocapture" | "--no-capture" | "--show-output" | "--quiet" | "-q"
            | "--include-ignored" => {}
            "--color" | "--format" | "-Z" => drop(value()),
            flag if flag.starts_with('-') => panic!("{flag} is not an option of this suite"),
            _ => options.filters.push(argument),
        }
    }
    options
}

#[derive(Clone)]
enum Outcome {
    Passed,
    Skipped(String),
    Failed(String),
}

struct Job {
    row: Row,
    mode: Mode,
}

impl Job {
    fn name(&self) -> String {
        format!("{}::{}", self.mode, short(self.row.name))
    }
}

fn short(name: &str) -> &str {
    name.split_once("::").map_or(name, |(_, rest)| rest)
}

/// Runs what the command line asks for.
pub(crate) fn run(rows: &[Row]) -> ExitCode {
    let options = options();
    let (able, unable) = backends();
    let wanted = |job: &Job| {
        let name = job.name();
        let matches = |filter: &String| {
            if options.exact { name == *filter } else { name.contains(&**filter) }
        };
        (options.filters.is_empty() || options.filters.iter().any(matches))
            && !options.without.iter().any(matches)
            && (options.backends.is_empty()
                || options.backends.iter().any(|b| b == job.mode.name()))
    };
    let jobs = rows.iter().flat_map(|row| able.iter().map(|mode| Job { row: *row, mode: *mode }));
    let jobs: Vec<Job> = jobs.filter(wanted).collect();
    if options.list {
        jobs.iter().for_each(|job| println!("{}: test", job.name()));
        return ExitCode::SUCCESS;
    }
    let default_hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !panic.payload().is::<Skipped>() {
            default_hook(panic);
        }
    }));
    let threads = options
        .threads
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(2, std::num::NonZero::get));
    let outcomes = run_all(&jobs, threads);
    print_table(&jobs, &outcomes, &unable)
}

fn run_all(jobs: &[Job], threads: usize) -> Vec<Outcome> {
    let next = std::sync::atomic::AtomicUsize::new(0);
    let outcomes = Mutex::new(vec![Outcome::Skipped("did not run".to_owned()); jobs.len()]);
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, jobs.len().max(1)) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    let Some(job) = jobs.get(index) else { return };
                    let outcome = run_one(job);
                    outcomes.lock().unwrap()[index] = outcome;
                }
            });
        }
    });
    outcomes.into_inner().unwrap()
}

fn run_one(job: &Job) -> Outcome {
    let began = Instant::now();
    let name = job.name();
    // A thread of its own: its name tells in a panic message which row that was.
    let thread = std::thread::Builder::new().name(name.clone());
    let result = thread.spawn({
        let (run, mode) = (job.row.run, job.mode);
        move || catch_unwind(AssertUnwindSafe(|| run(mode)))
    });
    let outcome = match result.unwrap().join() {
        Ok(Ok(())) => Outcome::Passed,
        Ok(Err(panic)) | Err(panic) => outcome_of(panic.as_ref()),
    };
    let word = match &outcome {
        Outcome::Passed => "ok",
        Outcome::Skipped(_) => "skipped",
        Outcome::Failed(_) => "FAILED",
    };
    println!("test {name} ... {word} ({:.1} s)", began.elapsed().as_secs_f64());
    outcome
}

fn outcome_of(panic: &(dyn Any + Send)) -> Outcome {
    if let Some(Skipped(why)) = panic.downcast_ref() {
        return Outcome::Skipped(why.clone());
    }
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    Outcome::Failed(text.unwrap_or("panicked").to_owned())
}

fn print_table(jobs: &[Job], outcomes: &[Outcome], unable: &[(Mode, String)]) -> ExitCode {
    let mut table: BTreeMap<&str, BTreeMap<Mode, &Outcome>> = BTreeMap::new();
    for (job, outcome) in jobs.iter().zip(outcomes) {
        table.entry(short(job.row.name)).or_default().insert(job.mode, outcome);
    }
    let modes = Mode::ALL.map(Mode::name);
    println!("\n{:<90} {}", "behaviour", modes.join("  "));
    for (name, cells) in &table {
        let cells = Mode::ALL.map(|mode| {
            let word = match cells.get(&mode) {
                Some(Outcome::Passed) => "ok",
                Some(Outcome::Failed(_)) => "FAILED",
                Some(Outcome::Skipped(_)) | None => "-",
            };
            format!("{word:<width$}", width = mode.name().len())
        });
        println!("{:<90} {}", name.replace('_', " "), cells.join("  "));
    }
    for (mode, why) in unable {
        println!("- {mode}: not on this machine: {why}");
    }
    let mut failed = 0;
    for (job, outcome) in jobs.iter().zip(outcomes) {
        match outcome {
            Outcome::Passed => {}
            Outcome::Skipped(why) => println!("- {}: {why}", job.name()),
            Outcome::Failed(why) => {
                failed += 1;
                println!("FAILED {}: {why}", job.name());
            }
        }
    }
    let passed = outcomes.iter().filter(|outcome| matches!(outcome, Outcome::Passed)).count();
    println!("\n{passed} passed, {failed} failed, {} skipped", outcomes.len() - passed - failed);
    // As libtest does.
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::from(101) }
}
