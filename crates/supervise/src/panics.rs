//! Panics as errors.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, PanicHookInfo};
use std::sync::{Mutex, PoisonError};

use futures_util::FutureExt;
use tokio::task::JoinHandle;

/// A panic's text may hold foreign data: no more than this many bytes of it are kept.
const MAX_MESSAGE: usize = 1024;

/// A task ended by a panic.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("internal error in {task}: {message}")]
pub struct Panicked {
    /// The name that the task was started with.
    pub task: &'static str,
    /// The panic's own text, shortened.
    pub message: String,
}

/// How many panics each task had. It holds only names that are part of the program, so it is bounded.
static COUNTS: Mutex<BTreeMap<&'static str, u64>> = Mutex::new(BTreeMap::new());

/// Runs `future`; a panic inside ends only this future.
///
/// State that the future shares with others may be half changed after a panic. Callers must not share such
/// state, or must read the truth again (as a reconcile loop does).
///
/// # Errors
/// When the future panicked. The panic is counted and logged already.
pub async fn caught<F: Future>(task: &'static str, future: F) -> Result<F::Output, Panicked> {
    AssertUnwindSafe(future).catch_unwind().await.map_err(|payload| count(task, payload.as_ref()))
}

/// Runs `work`, which does not wait, in the same way as [`caught`].
///
/// # Errors
/// When `work` panicked.
pub fn catch<T>(task: &'static str, work: impl FnOnce() -> T) -> Result<T, Panicked> {
    std::panic::catch_unwind(AssertUnwindSafe(work))
        .map_err(|payload| count(task, payload.as_ref()))
}

/// Starts a task on the runtime, in the same way as [`caught`].
pub fn spawn<F>(task: &'static str, future: F) -> JoinHandle<Result<F::Output, Panicked>>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    tokio::spawn(caught(task, future))
}

/// How many panics each task had since the process started; tasks without one are not named.
#[must_use]
pub fn panics() -> Vec<(&'static str, u64)> {
    let counts = COUNTS.lock().unwrap_or_else(PoisonError::into_inner);
    counts.iter().map(|(task, count)| (*task, *count)).collect()
}

/// Sends the text and place of each panic to the log instead of bare standard error. Call once, at start.
pub fn log_panics() {
    std::panic::set_hook(Box::new(|info: &PanicHookInfo<'_>| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let thread = std::thread::current().name().unwrap_or("unnamed").to_owned();
        let message = message(info.payload());
        // `RUST_BACKTRACE` decides whether there is one.
        let backtrace = std::backtrace::Backtrace::capture();
        let backtrace = match backtrace.status() {
            std::backtrace::BacktraceStatus::Captured => backtrace.to_string(),
            _ => String::new(),
        };
        tracing::error!(
            place,
            thread,
            message,
            backtrace,
            "Internal error (panic); please report it"
        );
    }));
}

fn count(task: &'static str, payload: &(dyn Any + Send)) -> Panicked {
    let panicked = Panicked { task, message: message(payload) };
    let mut counts = COUNTS.lock().unwrap_or_else(PoisonError::into_inner);
    let count = counts.entry(task).or_default();
    *count = count.saturating_add(1);
    drop(counts);
    tracing::error!(task, error = panicked.message, "A task ended by a panic");
    panicked
}

/// The text of a panic: `panic!` and `expect` give a string of either kind.
fn message(payload: &dyn Any) -> String {
    let text = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a value that is no text");
    text.get(..text.floor_char_boundary(MAX_MESSAGE)).unwrap_or(text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count_of(task: &str) -> u64 {
        panics().into_iter().find(|(name, _)| *name == task).map_or(0, |(_, count)| count)
    }

    #[tokio::test]
    async fn a_panic_ends_its_task_with_an_error_and_is_counted() {
        let unlucky = async {
            if true {
                panic!("no {}", "luck")
            }
        };
        let error: Panicked = spawn("one", unlucky).await.unwrap().unwrap_err();
        assert_eq!(error.to_string(), "internal error in one: no luck");
        assert_eq!(count_of("one"), 1);
    }

    #[tokio::test]
    async fn a_task_that_ends_well_gives_its_result() {
        assert_eq!(caught("two", async { 7 }).await, Ok(7));
        assert_eq!(count_of("two"), 0);
    }

    #[test]
    fn a_long_message_is_cut_at_a_character() {
        let error = catch("three", || panic!("{}", "ä".repeat(4000))).unwrap_err();
        assert_eq!(error.message.len(), MAX_MESSAGE);
    }
}
