use std::sync::atomic::{AtomicUsize, Ordering};

use http::HeaderValue;
use serde_json::{Value, json};

use super::*;

fn nowhere(certificate: Option<&[u8]>) -> Origin<'_> {
    Origin { peer: [192, 0, 2, 9].into(), certificate }
}

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
        access.check(nowhere(None), &Method::GET, "/pods", &HeaderMap::new()).await
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
    assert_eq!(check(ServerConfig { authorization, ..anonymous }).await, Ok(Identity::Anonymous));
}

#[tokio::test]
async fn masters_may_and_others_are_asked_about() {
    let access = Access::new(ServerConfig::default(), "n1".to_owned(), None);
    let check = async |group: &str| {
        let der = certificate("someone", group);
        access.check(nowhere(Some(&der)), &Method::POST, "/exec/a/b/c", &HeaderMap::new()).await
    };
    assert_eq!(check("system:masters").await, Ok(Identity::Named));
    let text = check("dev").await.unwrap_err().text;
    assert!(text.starts_with("Forbidden (user=someone, verb=create"), "{text}");
}

#[test]
fn tokens_and_subresources() {
    assert_eq!(bearer_token(&token("Bearer abc ")), Some("abc"));
    assert_eq!(bearer_token(&token("Basic abc")), None);
    assert_eq!(subresources("metrics"), ["metrics"]);
    assert_eq!(subresources("containerLogs"), ["proxy"]);
    assert_eq!(subresources("pods"), ["pods", "proxy"]);
}

/// An API server that answers reviews with `answer` and counts them.
fn api_server(
    answer: impl Fn(Value) -> Value + Clone + Send + 'static,
) -> (Client, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let service = tower::service_fn(move |request: http::Request<kube::client::Body>| {
        let (answer, count) = (answer.clone(), count.clone());
        async move {
            let body = request.into_body().collect_bytes().await.unwrap();
            let mut review: Value = serde_json::from_slice(&body).unwrap();
            // Long enough for others to ask the same meanwhile.
            tokio::task::yield_now().await;
            count.fetch_add(1, Ordering::Relaxed);
            review["status"] = answer(review["spec"].clone());
            let body = kube::client::Body::from(review.to_string().into_bytes());
            Ok::<_, std::convert::Infallible>(http::Response::new(body))
        }
    });
    (Client::new(service, "default"), asked)
}

fn user(spec: &Value) -> Value {
    let good = spec["token"].as_str().is_some_and(|token| token.starts_with("good"));
    json!({"authenticated": good, "user": {"username": spec["token"], "uid": "u",
        "extra": {"scope": [spec["token"]]}}})
}

async fn ask(access: &Access, peer: u8, method: Method, path: &str, value: &str) -> u16 {
    let origin = Origin { peer: [192, 0, 2, peer].into(), certificate: None };
    let value = HeaderValue::from_str(&format!("Bearer {value}")).unwrap();
    let headers = HeaderMap::from_iter([(header::AUTHORIZATION, value)]);
    let checked = access.check(origin, &method, path, &headers).await;
    checked.map_or_else(|refusal| refusal.status.as_u16(), |_| 200)
}

#[tokio::test]
async fn random_tokens_make_few_questions_and_known_callers_are_not_held_up() {
    let (client, asked) =
        api_server(
            |spec| {
                if spec["token"].is_string() { user(&spec) } else { json!({"allowed": true}) }
            },
        );
    let config = ServerConfig { token_review_ttl: Duration::ZERO, ..ServerConfig::default() };
    let access = Access::new(config, "n1".to_owned(), Some(client));
    assert_eq!(ask(&access, 1, Method::GET, "/pods", "good").await, 200);
    let mut statuses = Vec::new();
    for n in 0..2000 {
        statuses.push(ask(&access, 1, Method::GET, "/pods", &format!("random-{n}")).await);
    }
    assert!(asked.load(Ordering::Relaxed) < 100, "{asked:?}");
    assert!(statuses.contains(&401) && statuses.contains(&429));
    // Of the same address, and its answer held for no time at all.
    assert_eq!(ask(&access, 1, Method::GET, "/pods", "good").await, 200);
    assert_eq!(ask(&access, 2, Method::GET, "/pods", "good too").await, 200);
}

#[tokio::test]
async fn equal_questions_at_the_same_time_are_one() {
    let (client, asked) =
        api_server(
            |spec| {
                if spec["token"].is_string() { user(&spec) } else { json!({"allowed": true}) }
            },
        );
    let access = Access::new(ServerConfig::default(), "n1".to_owned(), Some(client));
    let all = (0..50).map(|_| ask(&access, 1, Method::GET, "/metrics", "good"));
    assert_eq!(futures_util::future::join_all(all).await, [200; 50]);
    assert_eq!(asked.load(Ordering::Relaxed), 2, "one about the token, one about the right");
}

#[tokio::test]
async fn a_narrow_token_does_not_get_the_answer_of_a_broad_one() {
    let (client, _) = api_server(|spec| {
        if spec["token"].is_string() {
            let mut answer = user(&spec);
            answer["user"]["username"] = "alice".into();
            return answer;
        }
        json!({"allowed": spec["extra"]["scope"][0] == "good broad"})
    });
    let access = Access::new(ServerConfig::default(), "n1".to_owned(), Some(client));
    assert_eq!(ask(&access, 1, Method::GET, "/metrics", "good broad").await, 200);
    assert_eq!(ask(&access, 1, Method::GET, "/metrics", "good narrow").await, 403);
}

#[tokio::test]
async fn whoever_may_only_read_runs_no_commands() {
    let (client, _) = api_server(|spec| {
        if spec["token"].is_string() {
            return user(&spec);
        }
        json!({"allowed": spec["resourceAttributes"]["verb"] == "get"})
    });
    let access = Access::new(ServerConfig::default(), "n1".to_owned(), Some(client));
    assert_eq!(ask(&access, 1, Method::GET, "/containerLogs/a/b/c", "good").await, 200);
    for path in ["/exec/a/b/c", "/attach/a/b/c", "/portForward/a/b", "//%65xec/a/b/c"] {
        assert_eq!(ask(&access, 1, Method::GET, path, "good").await, 403, "{path}");
    }
}
