//! Tasks that are started again.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::panics::caught;

/// The wait after a first panic. It doubles with each that follows soon.
const FIRST_WAIT: Duration = Duration::from_millis(200);
/// No wait is longer.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// A task that ran for so long before it panicked begins with the first wait again.
const STEADY: Duration = Duration::from_secs(300);

/// Runs the task that `start` gives until one ends without a panic; gives that one's result.
///
/// The task must read the truth when it starts: nothing of the one that panicked is left for it.
pub async fn restarting<F: Future>(task: &'static str, mut start: impl FnMut() -> F) -> F::Output {
    let mut wait = FIRST_WAIT;
    loop {
        let began = Instant::now();
        if let Ok(output) = caught(task, async { start().await }).await {
            return output;
        }
        if began.elapsed() >= STEADY {
            wait = FIRST_WAIT;
        }
        tracing::warn!(task, ?wait, "The task starts again");
        sleep(wait).await;
        wait = wait.saturating_mul(2).min(LONGEST_WAIT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_task_is_run_again_after_each_panic_and_waits_longer_each_time() {
        let began = Instant::now();
        let mut runs = 0_u32;
        let result = restarting("sometimes", || {
            runs += 1;
            let run = runs;
            async move { if run < 4 { panic!("run {run}") } else { run } }
        })
        .await;
        assert_eq!(result, 4);
        assert_eq!(began.elapsed(), FIRST_WAIT * 7);
    }
}
