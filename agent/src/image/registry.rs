//! A registry, spoken to with bounds: everything that it sends is read up to a limit, and in time.
//!
//! The protocol is that of the OCI distribution specification: `GET /v2/<name>/manifests/<reference>` and
//! `/v2/<name>/blobs/<digest>`, with Basic or Bearer authentication as the registry asks for it.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use http::header::{ACCEPT, AUTHORIZATION, WWW_AUTHENTICATE};
use http::{HeaderValue, StatusCode};
use reqwest::{Client, Response, Url, redirect};
use serde::Deserialize;
use tokio::time::Instant;

/// A manifest or an index. containerd refuses larger ones, too.
const LARGEST_MANIFEST: usize = 8 << 20;
/// A token with what comes with it.
const LARGEST_TOKEN: usize = 1 << 20;
/// Of an error, which is for people.
const LARGEST_ERROR: usize = 64 << 10;
/// Of an error that goes into statuses and events.
const LONGEST_TEXT: usize = 1024;
const CONNECT_LIMIT: Duration = Duration::from_secs(30);
/// For a manifest, a token or the beginning of a blob.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// Between two pieces of a blob.
const READ_LIMIT: Duration = Duration::from_secs(60);
/// A blob that does not bring so much in this time has no progress (containerd's image_pull_progress_timeout).
const PROGRESS: usize = 1 << 20;
const PROGRESS_LIMIT: Duration = Duration::from_secs(300);
const REDIRECTS: usize = 5;

/// What a registry did wrong, or refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum RegistryError {
    #[error("{step}: {source}")]
    Http { step: String, source: reqwest::Error },
    #[error("{step}: the registry answered {status}{text}")]
    Refused { step: String, status: StatusCode, text: String },
    #[error("{step}: the answer is larger than {limit} bytes")]
    TooLarge { step: String, limit: usize },
    #[error("{step}: no answer within {} s", limit.as_secs())]
    TooSlow { step: String, limit: Duration },
    #[error("the registry asks for authentication in a way that cannot be followed: {0}")]
    Challenge(String),
}

/// One repository of a registry, with a login.
pub(super) struct Registry {
    http: Client,
    base: Url,
    repository: String,
    login: Option<(String, String)>,
    /// What the registry wants to see, once that is known.
    authorization: Mutex<Option<HeaderValue>>,
}

#[derive(Deserialize)]
struct Token {
    #[serde(default)]
    token: String,
    #[serde(default)]
    access_token: String,
}

#[derive(Deserialize)]
struct Refusal {
    #[serde(default)]
    errors: Vec<RefusalCause>,
}

#[derive(Deserialize)]
struct RefusalCause {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

impl Registry {
    /// `plain` speaks HTTP without TLS.
    ///
    /// # Errors
    /// When the host is none, or TLS cannot be set up.
    pub(super) fn new(
        host: &str,
        repository: &str,
        plain: bool,
        login: Option<(String, String)>,
    ) -> Result<Self, RegistryError> {
        let failed = |source| RegistryError::Http { step: format!("use {host}"), source };
        let http = Client::builder()
            .connect_timeout(CONNECT_LIMIT)
            .read_timeout(READ_LIMIT)
            .redirect(redirect::Policy::custom(follow))
            .build()
            .map_err(failed)?;
        let scheme = if plain { "http" } else { "https" };
        let host = if host == "docker.io" { "index.docker.io" } else { host };
        let base = Url::parse(&format!("{scheme}://{host}/v2/"))
            .map_err(|error| RegistryError::Challenge(error.to_string()))?;
        let repository = repository.to_owned();
        Ok(Self { http, base, repository, login, authorization: Mutex::default() })
    }

    /// A manifest by tag or digest.
    ///
    /// # Errors
    /// When it is not there, or too large, or does not come in time.
    pub(super) async fn manifest(
        &self,
        reference: &str,
        accept: &str,
    ) -> Result<Bytes, RegistryError> {
        let step = format!("manifest {reference}");
        let read = async {
            let answer = self.get(&format!("manifests/{reference}"), accept, &step).await?;
            bounded(answer, LARGEST_MANIFEST, &step).await
        };
        in_time(read, &step).await
    }

    /// The content of a blob of `size` bytes. It ends with an error when more comes, or nothing for long.
    ///
    /// # Errors
    /// When it is not there.
    pub(super) async fn blob(
        &self,
        digest: &str,
        size: u64,
    ) -> Result<impl Stream<Item = Result<Vec<u8>, String>> + Send + 'static, RegistryError> {
        let step = format!("blob {digest}");
        let answer = in_time(self.get(&format!("blobs/{digest}"), "*/*", &step), &step).await?;
        if answer.content_length().is_some_and(|length| length > size) {
            return Err(RegistryError::TooLarge {
                step,
                limit: usize::try_from(size).unwrap_or(0),
            });
        }
        let parts = answer.bytes_stream().map(|part| part.map_err(|error| error.to_string()));
        Ok(no_more_than(parts.boxed(), size, digest.to_owned()))
    }

    async fn get(&self, path: &str, accept: &str, step: &str) -> Result<Response, RegistryError> {
        let answer = self.send(path, accept, step).await?;
        if answer.status() != StatusCode::UNAUTHORIZED {
            return self.good(answer, step).await;
        }
        let asked = answer.headers().get_all(WWW_AUTHENTICATE).iter();
        let challenges: Vec<String> =
            asked.filter_map(|value| value.to_str().ok().map(str::to_owned)).collect();
        self.authorize(&challenges).await?;
        let answer = self.send(path, accept, step).await?;
        self.good(answer, step).await
    }

    async fn send(&self, path: &str, accept: &str, step: &str) -> Result<Response, RegistryError> {
        let failed = |source| RegistryError::Http { step: step.to_owned(), source };
        let url = self.base.join(&format!("{}/{path}", self.repository));
        let url = url.map_err(|error| RegistryError::Challenge(error.to_string()))?;
        let known = self.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut request = self.http.get(url).header(ACCEPT, accept);
        if let Some(known) = known {
            request = request.header(AUTHORIZATION, known);
        }
        request.send().await.map_err(failed)
    }

    /// The answer, if it is a good one; else what the registry itself says. A body of another host, to which it only
    /// pointed, is not shown: that may be a server inside of the node's network.
    async fn good(&self, answer: Response, step: &str) -> Result<Response, RegistryError> {
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let own = answer.url().host_str() == self.base.host_str();
        let body = if own { bounded(answer, LARGEST_ERROR, step).await.ok() } else { None };
        let text = body.map(|body| refusal(&body)).unwrap_or_default();
        Err(RegistryError::Refused { step: step.to_owned(), status, text })
    }

    async fn authorize(&self, challenges: &[String]) -> Result<(), RegistryError> {
        let mut offered = Vec::new();
        for challenge in challenges {
            let parsed = http_auth::parse_challenges(challenge)
                .map_err(|error| RegistryError::Challenge(error.to_string()))?;
            for challenge in parsed {
                let parameter = |name: &str| {
                    let found =
                        challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
                    found.map(|(_, value)| value.to_unescaped())
                };
                if challenge.scheme.eq_ignore_ascii_case("bearer") {
                    let realm = parameter("realm").unwrap_or_default();
                    return self
                        .fetch_token(&realm, parameter("service"), parameter("scope"))
                        .await;
                }
                if challenge.scheme.eq_ignore_ascii_case("basic")
                    && let Some(basic) = self.basic()
                {
                    self.know(&basic);
                    return Ok(());
                }
                offered.push(challenge.scheme.to_owned());
            }
        }
        Err(RegistryError::Challenge(format!("there are no credentials for {offered:?}")))
    }

    async fn fetch_token(
        &self,
        realm: &str,
        service: Option<String>,
        scope: Option<String>,
    ) -> Result<(), RegistryError> {
        let mut url = Url::parse(realm)
            .map_err(|error| RegistryError::Challenge(format!("realm {realm:?}: {error}")))?;
        // The password goes there: not without TLS, unless the registry itself is spoken to so.
        if url.scheme() != "https" && url.scheme() != self.base.scheme() {
            return Err(RegistryError::Challenge(format!("realm {realm:?} is not https")));
        }
        let scope = scope.unwrap_or_else(|| format!("repository:{}:pull", self.repository));
        url.query_pairs_mut().append_pair("scope", &scope);
        if let Some(service) = service {
            url.query_pairs_mut().append_pair("service", &service);
        }
        let step = "token".to_owned();
        let mut request = self.http.get(url);
        if let Some(basic) = self.basic() {
            request = request.header(AUTHORIZATION, basic);
        }
        let read = async {
            let answer = request.send().await;
            let answer =
                answer.map_err(|source| RegistryError::Http { step: step.clone(), source })?;
            let answer = self.good(answer, &step).await?;
            bounded(answer, LARGEST_TOKEN, &step).await
        };
        let body = in_time(read, &step).await?;
        let token: Token = serde_json::from_slice(&body)
            .map_err(|_| RegistryError::Challenge("the token's answer is no token".into()))?;
        let token = if token.token.is_empty() { token.access_token } else { token.token };
        self.know(&format!("Bearer {token}"));
        Ok(())
    }

    fn basic(&self) -> Option<String> {
        let (user, password) = self.login.as_ref()?;
        Some(format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))))
    }

    fn know(&self, authorization: &str) {
        let mut value = HeaderValue::from_str(authorization).ok();
        if let Some(value) = &mut value {
            value.set_sensitive(true);
        }
        *self.authorization.lock().unwrap_or_else(PoisonError::into_inner) = value;
    }
}

/// Redirects go to content stores; none leads from TLS to none.
fn follow(attempt: redirect::Attempt<'_>) -> redirect::Action {
    let from_tls = attempt.previous().last().is_some_and(|url| url.scheme() == "https");
    if attempt.previous().len() > REDIRECTS {
        attempt.error("too many redirects")
    } else if from_tls && attempt.url().scheme() != "https" {
        attempt.error("a redirect from https to another scheme")
    } else {
        attempt.follow()
    }
}

async fn in_time<T>(
    work: impl Future<Output = Result<T, RegistryError>>,
    step: &str,
) -> Result<T, RegistryError> {
    let late = |_| RegistryError::TooSlow { step: step.to_owned(), limit: ANSWER_LIMIT };
    tokio::time::timeout(ANSWER_LIMIT, work).await.map_err(late)?
}

/// The body, up to `limit` bytes.
async fn bounded(mut answer: Response, limit: usize, step: &str) -> Result<Bytes, RegistryError> {
    let too_large = || RegistryError::TooLarge { step: step.to_owned(), limit };
    if answer.content_length().is_some_and(|length| length > limit as u64) {
        return Err(too_large());
    }
    let mut body = Vec::new();
    loop {
        let part = answer.chunk().await;
        match part.map_err(|source| RegistryError::Http { step: step.to_owned(), source })? {
            Some(part) if body.len() + part.len() > limit => return Err(too_large()),
            Some(part) => body.extend_from_slice(&part),
            None => return Ok(body.into()),
        }
    }
}

/// The parts of a blob, until more than `size` bytes came or the blob made no progress.
fn no_more_than(
    parts: impl Stream<Item = Result<Bytes, String>> + Send + Unpin + 'static,
    size: u64,
    digest: String,
) -> impl Stream<Item = Result<Vec<u8>, String>> + Send + 'static {
    let state = (parts, 0_u64, 0_usize, Instant::now() + PROGRESS_LIMIT, false);
    stream::unfold(state, move |(mut parts, mut total, mut recent, mut until, over)| {
        let digest = digest.clone();
        async move {
            if over {
                return None;
            }
            let next = match tokio::time::timeout_at(until, parts.next()).await {
                Ok(next) => next?,
                Err(_) => Err(format!("less than {PROGRESS} bytes in {PROGRESS_LIMIT:?}")),
            };
            let next = next.and_then(|part| {
                total = total.saturating_add(part.len() as u64);
                recent = recent.saturating_add(part.len());
                if total > size {
                    return Err(format!("more than the {size} bytes that its manifest gives"));
                }
                Ok(part.to_vec())
            });
            if recent >= PROGRESS {
                (recent, until) = (0, Instant::now() + PROGRESS_LIMIT);
            }
            let over = next.is_err();
            let next = next.map_err(|error| format!("layer {digest}: {error}"));
            Some((next, (parts, total, recent, until, over)))
        }
    })
}

/// What a registry says in the errors of the specification; nothing of any other body.
fn refusal(body: &[u8]) -> String {
    let Ok(refusal) = serde_json::from_slice::<Refusal>(body) else { return String::new() };
    let causes: Vec<String> =
        refusal.errors.iter().map(|cause| format!("{}: {}", cause.code, cause.message)).collect();
    let text = causes.join("; ");
    let end = text.floor_char_boundary(LONGEST_TEXT);
    let text = text.get(..end).unwrap_or_default();
    if text.is_empty() { String::new() } else { format!(": {text}") }
}

#[cfg(test)]
mod tests;
