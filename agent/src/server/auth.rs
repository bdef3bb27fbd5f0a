//! Who asks, and whether they may.
//!
//! A client is known by its certificate, else by its bearer token (TokenReview), else it is
//! anonymous where that is allowed. What it may do is the API server's decision
//! (SubjectAccessReview) on `nodes/<subresource>`; answers are kept for a while. Members of
//! `system:masters` may do everything, as in every cluster, so that logs and exec work
//! even while reviews cannot be asked for.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use http::{HeaderMap, Method, StatusCode, header};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
};
use kube::Client;
use sha2::{Digest, Sha256};

use super::find::Refusal;
use super::query;
use crate::config::{Authorization, ServerConfig};

mod answers;
mod rate;
mod reviewer;

use answers::{Answers, Flights, Known};
use rate::Rate;
use reviewer::Reviewer;

/// Bad tokens are asked about again after this time: they may have been created meanwhile.
const BAD_TOKEN_TTL: Duration = Duration::from_secs(10);
/// A user that is described at greater length is asked about each time.
const MAX_KEPT_USER: usize = 16 * 1024;

const ANONYMOUS: &str = "system:anonymous";

/// Whether a caller that was let in has a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    Named,
    Anonymous,
}

/// Who asks, as far as the connection tells.
#[derive(Debug, Clone, Copy)]
pub struct Origin<'a> {
    pub peer: IpAddr,
    /// Verified, in DER.
    pub certificate: Option<&'a [u8]>,
}

/// Decides about requests.
pub struct Access {
    config: ServerConfig,
    node_name: String,
    reviewer: Option<Arc<Reviewer>>,
    tokens: Answers<UserInfo>,
    /// Apart from the good ones, so that a flood of bad ones makes none of them forgotten.
    bad_tokens: Answers<()>,
    token_flights: Flights<Option<Option<UserInfo>>>,
    token_rate: Rate,
    decisions: Answers<bool>,
    decision_flights: Flights<Option<bool>>,
}

impl Access {
    /// Without a `client`, tokens are unknown and nobody but `system:masters` may do anything.
    pub fn new(config: ServerConfig, node_name: String, client: Option<Client>) -> Self {
        Self {
            config,
            node_name,
            reviewer: client.map(|client| Arc::new(Reviewer::new(client))),
            tokens: Answers::default(),
            bad_tokens: Answers::default(),
            token_flights: Flights::default(),
            token_rate: Rate::default(),
            decisions: Answers::default(),
            decision_flights: Flights::default(),
        }
    }

    /// Lets a request pass or says why not.
    ///
    /// # Errors
    /// 401 when the client is nobody, 403 when it may not, 429 when it must wait, 500 when that cannot be found out.
    pub async fn check(
        &self,
        origin: Origin<'_>,
        method: &Method,
        path: &str,
        headers: &HeaderMap,
    ) -> Result<Identity, Refusal> {
        let user = self.authenticate(origin, headers).await?;
        let anonymous = user.username.as_deref() == Some(ANONYMOUS);
        let identity = if anonymous { Identity::Anonymous } else { Identity::Named };
        if self.config.authorization == Authorization::AlwaysAllow || is_master(&user) {
            return Ok(identity);
        }
        let handler = query::segments(path).into_iter().next().unwrap_or_default();
        let (verb, subresources) = (verb(method, &handler), subresources(&handler));
        for subresource in subresources {
            if self.may(&user, verb, subresource).await? {
                return Ok(identity);
            }
        }
        let name = user.username.as_deref().unwrap_or_default();
        let text = format!(
            "Forbidden (user={name}, verb={verb}, resource=nodes, subresource(s)={subresources:?})"
        );
        Err(Refusal::new(StatusCode::FORBIDDEN, text))
    }

    async fn authenticate(
        &self,
        origin: Origin<'_>,
        headers: &HeaderMap,
    ) -> Result<UserInfo, Refusal> {
        if let Some(user) = origin.certificate.and_then(certificate_user) {
            return Ok(user);
        }
        let unauthorized = || Refusal::new(StatusCode::UNAUTHORIZED, "Unauthorized");
        if let Some(token) = bearer_token(headers) {
            if !self.config.token_review {
                return Err(unauthorized());
            }
            return self.review_token(origin.peer, token).await?.ok_or_else(unauthorized);
        }
        if self.config.anonymous {
            return Ok(UserInfo {
                username: Some(ANONYMOUS.to_owned()),
                groups: Some(vec!["system:unauthenticated".to_owned()]),
                ..UserInfo::default()
            });
        }
        Err(unauthorized())
    }

    async fn review_token(&self, peer: IpAddr, token: &str) -> Result<Option<UserInfo>, Refusal> {
        let key = Sha256::digest(token.as_bytes()).into();
        let known = self.tokens.get(&key);
        if let Known::Holds(user) = known {
            return Ok(Some(user));
        }
        let Some(reviewer) = &self.reviewer else { return Ok(None) };
        if let Known::Holds(()) = self.bad_tokens.get(&key) {
            return Ok(None);
        }
        let ask = || {
            // A token that was good before does not wait behind a flood of others.
            if known == Known::No && !self.token_rate.allows(peer, Instant::now()) {
                let text = "too many tokens that are not known here; try again later";
                return Err(Refusal::new(StatusCode::TOO_MANY_REQUESTS, text));
            }
            let spec = TokenReviewSpec { token: token.to_owned(), ..TokenReviewSpec::default() };
            let review = TokenReview { spec, ..TokenReview::default() };
            let reviewer = reviewer.clone();
            Ok(async move {
                let status = reviewer.ask(review).await?.status.unwrap_or_default();
                Some(status.user.filter(|_| status.authenticated == Some(true)))
            }
            .boxed())
        };
        let answer = self.token_flights.join(key, ask).await?;
        let user = answer.ok_or_else(|| Refusal::new(StatusCode::UNAUTHORIZED, "Unauthorized"))?;
        match &user {
            Some(user) if length(user) <= MAX_KEPT_USER => {
                self.tokens.put(key, user.clone(), self.config.token_review_ttl);
            }
            Some(_) => {}
            None => self.bad_tokens.put(key, (), BAD_TOKEN_TTL),
        }
        Ok(user)
    }

    async fn may(
        &self,
        user: &UserInfo,
        verb: &'static str,
        subresource: &'static str,
    ) -> Result<bool, Refusal> {
        let Some(reviewer) = &self.reviewer else { return Ok(false) };
        let spec = self.question(user, verb, subresource);
        // The whole question: whatever the API server may decide by is part of the key.
        let key = Sha256::digest(serde_json::to_vec(&spec).unwrap_or_default()).into();
        if let Known::Holds(allowed) = self.decisions.get(&key) {
            return Ok(allowed);
        }
        let ask = || {
            let review = SubjectAccessReview { spec, ..SubjectAccessReview::default() };
            let reviewer = reviewer.clone();
            Ok(async move {
                Some(reviewer.ask(review).await?.status.is_some_and(|status| status.allowed))
            }
            .boxed())
        };
        let allowed = self.decision_flights.join(key, ask).await?.ok_or_else(|| {
            let text = format!(
                "Authorization error (user={}, verb={verb}, resource=nodes, subresource={subresource})",
                user.username.as_deref().unwrap_or_default()
            );
            Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, text)
        })?;
        let ttl = if allowed { self.config.authorized_ttl } else { self.config.unauthorized_ttl };
        self.decisions.put(key, allowed, ttl);
        Ok(allowed)
    }

    fn question(
        &self,
        user: &UserInfo,
        verb: &'static str,
        subresource: &'static str,
    ) -> SubjectAccessReviewSpec {
        SubjectAccessReviewSpec {
            user: user.username.clone(),
            groups: user.groups.clone(),
            uid: user.uid.clone(),
            extra: user.extra.clone(),
            resource_attributes: Some(ResourceAttributes {
                verb: Some(verb.to_owned()),
                version: Some("v1".to_owned()),
                resource: Some("nodes".to_owned()),
                subresource: Some(subresource.to_owned()),
                name: Some(self.node_name.clone()),
                ..ResourceAttributes::default()
            }),
            ..SubjectAccessReviewSpec::default()
        }
    }
}

fn length(user: &UserInfo) -> usize {
    serde_json::to_vec(user).map_or(usize::MAX, |json| json.len())
}

fn is_master(user: &UserInfo) -> bool {
    user.groups.iter().flatten().any(|group| group == "system:masters")
}

/// The user that a verified client certificate names: common name and organisations.
fn certificate_user(der: &[u8]) -> Option<UserInfo> {
    let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
    let subject = certificate.subject();
    let name = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
    let organisations = subject.iter_organization().filter_map(|o| o.as_str().ok());
    let mut groups: Vec<String> = organisations.map(str::to_owned).collect();
    groups.push("system:authenticated".to_owned());
    Some(UserInfo { username: Some(name), groups: Some(groups), ..UserInfo::default() })
}

fn bearer_token(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

/// The verb that RBAC knows a method by.
///
/// WebSocket clients open sessions by GET. The kubelet asks for `get` then, so that whoever may read `nodes/proxy` may
/// run commands; here a session always needs `create`.
fn verb(method: &Method, handler: &str) -> &'static str {
    match (method.as_str(), handler) {
        ("POST", _) | ("GET", "exec" | "attach" | "portForward") => "create",
        ("PUT", _) => "update",
        ("PATCH", _) => "patch",
        ("DELETE", _) => "delete",
        _ => "get",
    }
}

/// The subresources of `nodes` of which one must be allowed, the finest first.
fn subresources(handler: &str) -> &'static [&'static str] {
    match handler {
        "stats" => &["stats"],
        "metrics" => &["metrics"],
        "logs" => &["log"],
        "checkpoint" => &["checkpoint"],
        "pods" | "runningpods" => &["pods", "proxy"],
        "healthz" => &["healthz", "proxy"],
        "configz" => &["configz", "proxy"],
        _ => &["proxy"],
    }
}

#[cfg(test)]
mod tests;
