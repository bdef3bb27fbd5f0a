//! Questions to the API server about callers.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use kube::api::PostParams;
use kube::{Api, Client};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;
use tracing::warn;

/// Questions to the API server at a time.
const QUESTIONS: usize = 16;
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
const WARNING_EVERY: Duration = Duration::from_secs(60);

/// Asks the API server, some questions at a time.
pub(super) struct Reviewer {
    client: Client,
    questions: Semaphore,
    warned: Mutex<Option<Instant>>,
}

impl Reviewer {
    pub(super) fn new(client: Client) -> Self {
        Self { client, questions: Semaphore::new(QUESTIONS), warned: Mutex::default() }
    }

    /// `None` when there is no answer, which is logged.
    pub(super) async fn ask<R>(&self, review: R) -> Option<R>
    where
        R: kube::Resource<DynamicType = (), Scope = k8s_openapi::ClusterResourceScope>
            + Clone
            + Serialize
            + DeserializeOwned
            + std::fmt::Debug,
    {
        let api: Api<R> = Api::all(self.client.clone());
        let answer = async {
            let _permit = self.questions.acquire().await.map_err(|error| error.to_string())?;
            let answer = api.create(&PostParams::default(), &review).await;
            answer.map_err(|error| error.to_string())
        };
        let error = match tokio::time::timeout(ANSWER_LIMIT, answer).await {
            Ok(Ok(answer)) => return Some(answer),
            Ok(Err(error)) => error,
            Err(_) => "no answer in time".to_owned(),
        };
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        // Callers must not fill the log.
        if warned.is_none_or(|warned| warned.elapsed() >= WARNING_EVERY) {
            *warned = Some(Instant::now());
            warn!(kind = %R::kind(&()), error, "Cannot ask the API server about a caller");
        }
        None
    }
}
