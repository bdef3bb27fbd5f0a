//! Who asks, and whether they may.
//!
//! A client is known by its certificate, else by its bearer token (TokenReview), else it is
//! anonymous where that is allowed. What it may do is the API server's decision
//! (SubjectAccessReview) on `nodes/<subresource>`; answers are kept for a while. Members of
//! `system:masters` may do everything, as in every cluster, so that logs and exec work
//! even while reviews cannot be asked for.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use http::{HeaderMap, Method, StatusCode, header};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
};
use kube::api::PostParams;
use kube::{Api, Client};
use sha2::{Digest, Sha256};
use tracing::warn;

use super::find::Refusal;
use crate::config::{Authorization, ServerConfig};

/// Bad tokens are asked about again after this time: they may have been created meanwhile.
const BAD_TOKEN_TTL: Duration = Duration::from_secs(10);
/// Answers kept at a time; beyond it the oldest ones go.
const CACHE_SIZE: usize = 4096;

const ANONYMOUS: &str = "system:anonymous";

/// Whether a caller that was let in has a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    Named,
    Anonymous,
}

/// Decides about requests.
pub struct Access {
    config: ServerConfig,
    node_name: String,
    client: Option<Client>,
    tokens: Cache<[u8; 32], Option<UserInfo>>,
    decisions: Cache<Question, bool>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Question {
    user: String,
    groups: Vec<String>,
    verb: &'static str,
    subresource: &'static str,
}

impl Access {
    /// Without a `client`, tokens are unknown and nobody but `system:masters` may do anything.
    pub fn new(config: ServerConfig, node_name: String, client: Option<Client>) -> Self {
        Self { config, node_name, client, tokens: Cache::default(), decisions: Cache::default() }
    }

    /// Lets a request pass or says why not.
    ///
    /// # Errors
    /// 401 when the client is nobody, 403 when it may not, 500 when that cannot be found out.
    pub async fn check(
        &self,
        certificate: Option<&[u8]>,
        method: &Method,
        path: &str,
        headers: &HeaderMap,
    ) -> Result<Identity, Refusal> {
        let user = self.authenticate(certificate, headers).await?;
        let anonymous = user.username.as_deref() == Some(ANONYMOUS);
        let identity = if anonymous { Identity::Anonymous } else { Identity::Named };
        if self.config.authorization == Authorization::AlwaysAllow || is_master(&user) {
            return Ok(identity);
        }
        let (verb, subresources) = (verb(method), subresources(path));
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
        certificate: Option<&[u8]>,
        headers: &HeaderMap,
    ) -> Result<UserInfo, Refusal> {
        if let Some(user) = certificate.and_then(certificate_user) {
            return Ok(user);
        }
        let unauthorized = || Refusal::new(StatusCode::UNAUTHORIZED, "Unauthorized");
        if let Some(token) = bearer_token(headers) {
            if !self.config.token_review {
                return Err(unauthorized());
            }
            return self.review_token(token).await?.ok_or_else(unauthorized);
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

    async fn review_token(&self, token: &str) -> Result<Option<UserInfo>, Refusal> {
        // Only a digest is kept: a memory dump must not hand out tokens.
        let key: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        if let Some(user) = self.tokens.get(&key) {
            return Ok(user);
        }
        let Some(client) = &self.client else { return Ok(None) };
        let spec = TokenReviewSpec { token: token.to_owned(), ..TokenReviewSpec::default() };
        let review = TokenReview { spec, ..TokenReview::default() };
        let api: Api<TokenReview> = Api::all(client.clone());
        let answer = api.create(&PostParams::default(), &review).await.map_err(|error| {
            warn!(%error, "Cannot ask the API server about a token");
            Refusal::new(StatusCode::UNAUTHORIZED, "Unauthorized")
        })?;
        let status = answer.status.unwrap_or_default();
        let user = status.user.filter(|_| status.authenticated == Some(true));
        let ttl = if user.is_some() { self.config.token_review_ttl } else { BAD_TOKEN_TTL };
        self.tokens.put(key, user.clone(), ttl);
        Ok(user)
    }

    async fn may(
        &self,
        user: &UserInfo,
        verb: &'static str,
        subresource: &'static str,
    ) -> Result<bool, Refusal> {
        let question = Question {
            user: user.username.clone().unwrap_or_default(),
            groups: user.groups.clone().unwrap_or_default(),
            verb,
            subresource,
        };
        if let Some(allowed) = self.decisions.get(&question) {
            return Ok(allowed);
        }
        let Some(client) = &self.client else { return Ok(false) };
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
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
            },
            ..SubjectAccessReview::default()
        };
        let api: Api<SubjectAccessReview> = Api::all(client.clone());
        let answer = api.create(&PostParams::default(), &review).await.map_err(|error| {
            warn!(%error, "Cannot ask the API server about a permission");
            let text = format!(
                "Authorization error (user={}, verb={verb}, resource=nodes, subresource={subresource})",
                question.user
            );
            Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, text)
        })?;
        let allowed = answer.status.is_some_and(|status| status.allowed);
        let ttl = if allowed { self.config.authorized_ttl } else { self.config.unauthorized_ttl };
        self.decisions.put(question, allowed, ttl);
        Ok(allowed)
    }
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
fn verb(method: &Method) -> &'static str {
    match method.as_str() {
        "POST" => "create",
        "PUT" => "update",
        "PATCH" => "patch",
        "DELETE" => "delete",
        _ => "get",
    }
}

/// The subresources of `nodes` of which one must be allowed, the finest first.
fn subresources(path: &str) -> &'static [&'static str] {
    match path.trim_start_matches('/').split('/').next().unwrap_or_default() {
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

/// Answers that hold for a while.
struct Cache<K, V> {
    entries: Mutex<HashMap<K, (V, Instant)>>,
}

impl<K, V> Default for Cache<K, V> {
    fn default() -> Self {
        Self { entries: Mutex::new(HashMap::new()) }
    }
}

impl<K: Eq + Hash + Clone, V: Clone> Cache<K, V> {
    fn get(&self, key: &K) -> Option<V> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let (value, until) = entries.get(key)?;
        (*until > Instant::now()).then(|| value.clone())
    }

    fn put(&self, key: K, value: V, ttl: Duration) {
        let now = Instant::now();
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.len() >= CACHE_SIZE {
            entries.retain(|_, (_, until)| *until > now);
        }
        if entries.len() >= CACHE_SIZE {
            let oldest = entries.iter().min_by_key(|(_, (_, until))| *until);
            if let Some(oldest) = oldest.map(|(key, _)| key.clone()) {
                entries.remove(&oldest);
            }
        }
        entries.insert(key, (value, now + ttl));
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn token(value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(header::AUTHORIZATION, HeaderValue::from_static(value))])
    }

    fn certificate(name: &str, group: &str) -> Vec<u8> {
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.distinguished_name.push(rcgen::DnType::OrganizationName, group);
        let key = rcgen::KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().to_vec()
    }

    #[tokio::test]
    async fn without_credentials_nobody_gets_in_unless_anonymous_may() {
        let check = async |config: ServerConfig| {
            let access = Access::new(config, "n1".to_owned(), None);
            access.check(None, &Method::GET, "/pods", &HeaderMap::new()).await
        };
        let refusal = check(ServerConfig::default()).await.unwrap_err();
        assert_eq!(refusal, Refusal::new(StatusCode::UNAUTHORIZED, "Unauthorized"));
        let anonymous = ServerConfig { anonymous: true, ..ServerConfig::default() };
        let refusal = check(anonymous.clone()).await.unwrap_err();
        assert_eq!(
            refusal.text,
            "Forbidden (user=system:anonymous, verb=get, resource=nodes, \
             subresource(s)=[\"pods\", \"proxy\"])"
        );
        let authorization = Authorization::AlwaysAllow;
        assert_eq!(
            check(ServerConfig { authorization, ..anonymous }).await,
            Ok(Identity::Anonymous)
        );
    }

    #[tokio::test]
    async fn masters_may_and_others_are_asked_about() {
        let access = Access::new(ServerConfig::default(), "n1".to_owned(), None);
        let check = async |group: &str| {
            let der = certificate("someone", group);
            access.check(Some(&der), &Method::POST, "/exec/a/b/c", &HeaderMap::new()).await
        };
        assert_eq!(check("system:masters").await, Ok(Identity::Named));
        let text = check("dev").await.unwrap_err().text;
        assert!(text.starts_with("Forbidden (user=someone, verb=create"), "{text}");
    }

    #[test]
    fn tokens_and_subresources() {
        assert_eq!(bearer_token(&token("Bearer abc ")), Some("abc"));
        assert_eq!(bearer_token(&token("Basic abc")), None);
        assert_eq!(subresources("/metrics/resource"), ["metrics"]);
        assert_eq!(subresources("/containerLogs/a/b/c"), ["proxy"]);
        assert_eq!(subresources("//pods"), ["pods", "proxy"]);
    }

    #[test]
    fn a_cache_forgets() {
        let cache = Cache::default();
        cache.put("a", 1, Duration::from_secs(100));
        cache.put("b", 2, Duration::ZERO);
        assert_eq!((cache.get(&"a"), cache.get(&"b")), (Some(1), None));
        for i in 0..CACHE_SIZE {
            cache.put(Box::leak(i.to_string().into_boxed_str()), 0, Duration::from_secs(200));
        }
        assert_eq!(cache.get(&"a"), None);
        assert_eq!(cache.entries.lock().unwrap().len(), CACHE_SIZE);
    }
}
