//! Request bodies in, responses out.

use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE, HeaderValue, RETRY_AFTER, WARNING};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use serde_json::Value;

use super::{Reply, boxed};
use crate::error::ApiError;

/// As much as etcd-backed servers take.
const LARGEST: usize = 3 << 20;
/// A client that sends its body more slowly than this is not served.
const LONGEST: Duration = Duration::from_secs(60);
/// The media type of RFC 6902, the only one whose body is a list.
const JSON_PATCH: &str = "application/json-patch+json";

/// The Accept header, empty when there is none.
pub(super) fn accept<B>(request: &Request<B>) -> &str {
    request.headers().get(ACCEPT).and_then(|h| h.to_str().ok()).unwrap_or_default()
}

/// The media type of the body, without parameters.
pub(super) fn media_type<B>(request: &Request<B>) -> String {
    let header = request.headers().get(CONTENT_TYPE).and_then(|h| h.to_str().ok());
    let header = header.unwrap_or_default();
    header.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

pub(super) async fn read(body: Incoming) -> Result<Bytes, ApiError> {
    let collected = tokio::time::timeout(LONGEST, Limited::new(body, LARGEST).collect()).await;
    let collected = collected.map_err(|_| {
        ApiError::new(408, "Timeout", format!("the request's body took longer than {LONGEST:?}"))
    })?;
    collected.map(http_body_util::Collected::to_bytes).map_err(|error| {
        if error.downcast_ref::<http_body_util::LengthLimitError>().is_some() {
            let text = format!("Request entity too large: limit is {LARGEST}");
            ApiError::new(413, "RequestEntityTooLarge", text)
        } else {
            ApiError::bad_request(format!("the request's body broke off: {error}"))
        }
    })
}

/// Reads a body in JSON, YAML or Kubernetes' protobuf: an object, or the list of a JSON patch.
///
/// # Errors
/// 400 when the body is of another shape: everything that reads it later relies on that.
pub(crate) fn parse(media: &str, bytes: &[u8]) -> Result<Value, ApiError> {
    let value = decode(media, bytes)?;
    let (expected, fits) = match media {
        JSON_PATCH => ("a list of operations", value.is_array()),
        // Null is no body, and becomes an object with the first field that is written.
        _ => ("an object", value.is_object() || value.is_null()),
    };
    if !fits {
        let text = format!("the body of the request is {}, expected {expected}", kind_of(&value));
        return Err(ApiError::bad_request(text));
    }
    // Every kind has an object there, and much is read and written below it.
    match value.get("metadata") {
        None | Some(Value::Object(_) | Value::Null) => Ok(value),
        Some(other) => Err(ApiError::bad_request(format!(
            "metadata: expected an object, not {}",
            kind_of(other)
        ))),
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn decode(media: &str, bytes: &[u8]) -> Result<Value, ApiError> {
    match media {
        "application/yaml" | "application/apply-patch+yaml" => {
            let text = std::str::from_utf8(bytes)
                .map_err(|e| ApiError::bad_request(format!("the body is not UTF-8: {e}")))?;
            serde_saphyr::from_str(text)
                .map_err(|e| ApiError::bad_request(format!("error parsing YAML: {e}")))
        }
        "application/vnd.kubernetes.protobuf" => super::protobuf::to_json(bytes).map_err(|why| {
            let text = format!(
                "the body of the request was in an unknown format ({why}) - accepted media types include: \
                 application/json, application/yaml"
            );
            ApiError::new(415, "UnsupportedMediaType", text)
        }),
        _ => serde_json::from_slice(bytes).map_err(|e| {
            ApiError::bad_request(format!("couldn't get version/kind; json parse error: {e}"))
        }),
    }
}

pub(super) fn bytes(status: StatusCode, media: &'static str, bytes: impl Into<Bytes>) -> Reply {
    let mut response = Response::new(boxed(bytes));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(media));
    response
}

pub(super) fn json(status: StatusCode, value: &Value) -> Reply {
    bytes(status, "application/json", value.to_string())
}

pub(super) fn text(status: StatusCode, text: &'static str) -> Reply {
    bytes(status, "text/plain; charset=utf-8", text)
}

/// Adds what the client should be told although the request succeeded.
pub(super) fn warn(mut reply: Reply, warnings: &[String]) -> Reply {
    for warning in warnings {
        let quoted = warning.replace('\\', "\\\\").replace('"', "\\\"");
        if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{quoted}\"")) {
            reply.headers_mut().append(WARNING, value);
        }
    }
    reply
}

pub(crate) fn status_response(error: &ApiError) -> Reply {
    let code = StatusCode::from_u16(error.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut reply = json(code, &error.status());
    if error.code == 429 {
        reply.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    }
    reply
}
