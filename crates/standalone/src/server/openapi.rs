//! The little of OpenAPI that kubectl needs.
//!
//! There are no schemas: validation happens here, not in kubectl. kubectl 1.20 reads `/openapi/v2`
//! and checks nothing when a kind is missing there; newer ones look in `/openapi/v3` whether the
//! server takes `fieldValidation`.

use http::StatusCode;
use serde_json::{Value, json};

use super::{Reply, body, discovery};
use crate::error::ApiError;
use crate::kinds::{self, Kind};

pub(super) fn document(path: &str, accept: &str) -> Result<Reply, ApiError> {
    let segments: Vec<&str> = path.split('/').filter(|s| !s.is_empty()).collect();
    match segments.as_slice() {
        // An empty protobuf message is an empty document.
        ["openapi", "v2"] if accept.contains("protobuf") => {
            let media = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";
            Ok(body::bytes(StatusCode::OK, media, ""))
        }
        ["openapi", "v2"] => Ok(body::json(
            StatusCode::OK,
            &json!({"swagger": "2.0", "info": info(), "paths": {}, "definitions": {}}),
        )),
        ["openapi", "v3"] => {
            let mut paths = serde_json::Map::new();
            for (path, url) in [("api/v1".to_owned(), "/openapi/v3/api/v1".to_owned())]
                .into_iter()
                .chain(discovery::groups().into_iter().map(|group| {
                    (format!("apis/{group}/v1"), format!("/openapi/v3/apis/{group}/v1"))
                }))
            {
                paths.insert(path, json!({"serverRelativeURL": url}));
            }
            Ok(body::json(StatusCode::OK, &json!({"paths": paths})))
        }
        ["openapi", "v3", "api", "v1"] => Ok(group("")),
        ["openapi", "v3", "apis", name, "v1"] if discovery::groups().contains(name) => {
            Ok(group(name))
        }
        _ => {
            Err(ApiError::new(404, "NotFound", "the server could not find the requested resource"))
        }
    }
}

fn info() -> Value {
    json!({"title": "Kubernetes", "version": discovery::GIT_VERSION})
}

fn group(group: &str) -> Reply {
    let mut paths = serde_json::Map::new();
    for kind in kinds::all().iter().copied().filter(|k| k.group == group) {
        paths.insert(path_of(kind), json!({"patch": operation(kind)}));
    }
    let document = json!({
        "openapi": "3.0.0", "info": info(), "paths": paths, "components": {"schemas": {}},
    });
    body::json(StatusCode::OK, &document)
}

fn path_of(kind: &Kind) -> String {
    let prefix = if kind.group.is_empty() { "/api/" } else { "/apis/" };
    let namespace = if kind.namespaced { "namespaces/{namespace}/" } else { "" };
    format!("{prefix}{}/{namespace}{}/{{name}}", kind.api_version(), kind.plural)
}

fn operation(kind: &Kind) -> Value {
    let parameter = |name: &str| json!({"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": true}});
    let parameters = ["dryRun", "fieldManager", "fieldValidation", "force"].map(parameter);
    json!({
        "x-kubernetes-action": "patch",
        "x-kubernetes-group-version-kind":
            {"group": kind.group, "version": kind.version, "kind": kind.kind},
        "parameters": parameters,
        "responses": {},
    })
}
