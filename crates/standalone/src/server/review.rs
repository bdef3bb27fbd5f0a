//! Questions that are answered and not stored: may I, who am I, whose token is this.

use std::sync::Arc;

use http::{Method, Request, StatusCode};
use hyper::body::Incoming;
use serde_json::{Value, json};

use super::{Reply, Server, body};
use crate::auth::Identity;
use crate::auth::authorise::{Attributes, allowed};
use crate::auth::token::ISSUER;
use crate::error::ApiError;

/// A question, recognised.
pub(super) struct Question<'a> {
    server: &'a Arc<Server>,
    resource: String,
    identity: &'a Identity,
}

/// Recognises a question by its path.
pub(super) fn handle<'a>(
    server: &'a Arc<Server>,
    group: &str,
    resource: &str,
    identity: &'a Identity,
    method: &Method,
) -> Option<Question<'a>> {
    let known = matches!(
        (group, resource),
        (
            "authorization.k8s.io",
            "selfsubjectaccessreviews"
                | "subjectaccessreviews"
                | "localsubjectaccessreviews"
                | "selfsubjectrulesreviews"
        ) | ("authentication.k8s.io", "tokenreviews" | "selfsubjectreviews")
    );
    (known && *method == Method::POST).then(|| Question {
        server,
        resource: resource.to_owned(),
        identity,
    })
}

pub(super) async fn answer(
    question: Question<'_>,
    request: Request<Incoming>,
) -> Result<Reply, ApiError> {
    let media = body::media_type(&request);
    let mut review = body::parse(&media, &body::read(request.into_body()).await?)?;
    let spec = review["spec"].clone();
    review["status"] = match question.resource.as_str() {
        "selfsubjectaccessreviews" => access(question.identity, &spec),
        "subjectaccessreviews" | "localsubjectaccessreviews" => access(&subject(&spec), &spec),
        "selfsubjectrulesreviews" => rules(question.identity),
        "selfsubjectreviews" => json!({"userInfo": user_info(question.identity)}),
        _ => token(question.server, &spec),
    };
    Ok(body::json(StatusCode::CREATED, &review))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn subject(spec: &Value) -> Identity {
    let groups = spec["groups"].as_array().map(Vec::as_slice).unwrap_or_default();
    Identity {
        user: text(&spec["user"]).to_owned(),
        uid: text(&spec["uid"]).to_owned(),
        groups: groups.iter().map(|g| text(g).to_owned()).collect(),
    }
}

fn access(identity: &Identity, spec: &Value) -> Value {
    let resource = &spec["resourceAttributes"];
    let path = &spec["nonResourceAttributes"];
    let wants = if resource.is_object() {
        Attributes {
            verb: text(&resource["verb"]),
            group: text(&resource["group"]),
            resource: text(&resource["resource"]),
            subresource: text(&resource["subresource"]),
            namespace: text(&resource["namespace"]),
            name: text(&resource["name"]),
            path: "",
        }
    } else {
        Attributes { verb: text(&path["verb"]), path: text(&path["path"]), ..Attributes::default() }
    };
    json!({"allowed": allowed(identity, &wants)})
}

fn rules(identity: &Identity) -> Value {
    let all = json!({"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]});
    let everything = identity.is_in("system:masters");
    json!({
        "resourceRules": if everything { json!([all]) } else { json!([]) },
        "nonResourceRules": [{
            "verbs": ["get"],
            "nonResourceURLs": ["/healthz", "/livez", "/readyz", "/version", "/api/*", "/apis/*"],
        }],
        "incomplete": !everything,
    })
}

fn user_info(identity: &Identity) -> Value {
    let mut info = json!({"username": identity.user, "groups": identity.groups});
    if !identity.uid.is_empty() {
        info["uid"] = identity.uid.clone().into();
    }
    info
}

fn token(server: &Arc<Server>, spec: &Value) -> Value {
    let refused = |why: &str| json!({"authenticated": false, "user": {}, "error": why});
    let Some((identity, audiences)) = server.tokens.check(text(&spec["token"]), &server.registry)
    else {
        return refused("the token is not valid");
    };
    let wanted: Vec<String> = match spec["audiences"].as_array() {
        Some(list) if !list.is_empty() => list.iter().map(|a| text(a).to_owned()).collect(),
        _ => vec![ISSUER.to_owned()],
    };
    let common: Vec<_> = wanted.into_iter().filter(|a| audiences.contains(a)).collect();
    if common.is_empty() {
        return refused("the token is for another audience");
    }
    json!({"authenticated": true, "user": user_info(&identity), "audiences": common})
}
