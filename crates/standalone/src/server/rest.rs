//! The verbs on stored kinds.

pub(crate) mod paging;
mod subresource;

use std::sync::Arc;

use http::{Method, Request, StatusCode};
use hyper::body::Incoming;
use serde_json::{Value, json};

use super::route::{Query, ResourcePath, Route};
use super::{Reply, Server, body, events, kubelet, review, table, watching};
use crate::auth::Identity;
use crate::decode;
use crate::error::ApiError;
use crate::kinds::{self, Kind};
use crate::object::Object;
use crate::registry::{DeleteOptions, PatchType, Preconditions, Propagation, Target, WriteOptions};
use crate::selectors::Selector;

/// How the client wants to see objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Output {
    Json,
    Table,
    Metadata,
}

impl Output {
    pub(super) fn negotiate(accept: &str) -> Self {
        let mut wanted = accept.split(',').map(str::trim);
        let first = wanted.find_map(|media| {
            let kind = media.split(';').next().unwrap_or_default();
            if !matches!(kind, "application/json" | "*/*" | "application/*") {
                return None;
            }
            if media.contains("as=Table") {
                media
                    .contains("v=v1;")
                    .then_some(Self::Table)
                    .or_else(|| media.ends_with("v=v1").then_some(Self::Table))
            } else if media.contains("as=PartialObjectMetadata") {
                Some(Self::Metadata)
            } else {
                Some(Self::Json)
            }
        });
        first.unwrap_or(Self::Json)
    }
}

/// The verb of a request, as authorisation names it.
pub(super) fn verb(request: &Request<Incoming>, route: &Route) -> &'static str {
    let Route::Resource(path) = route else {
        return if request.method() == Method::GET { "get" } else { "post" };
    };
    match *request.method() {
        Method::GET | Method::HEAD if path.name.is_empty() => {
            if Query::parse(request.uri().query()).is_true("watch") { "watch" } else { "list" }
        }
        Method::GET | Method::HEAD => "get",
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE if path.name.is_empty() => "deletecollection",
        Method::DELETE => "delete",
        _ => "unknown",
    }
}

/// One request on a resource, taken apart.
pub(super) struct Call<'a> {
    pub(super) server: &'a Arc<Server>,
    /// The kind under which the objects are stored.
    pub(super) kind: &'static Kind,
    /// The kind that the client speaks.
    pub(super) shown: &'static Kind,
    pub(super) path: &'a ResourcePath,
    pub(super) query: Query,
    pub(super) output: Output,
}

pub(super) async fn handle(
    server: &Arc<Server>,
    request: Request<Incoming>,
    path: &ResourcePath,
    identity: &Identity,
) -> Result<Reply, ApiError> {
    if let Some(reply) =
        review::handle(server, &path.group, &path.resource, identity, request.method())
    {
        return review::answer(reply, request).await;
    }
    let shown = kinds::by_path(&path.group, &path.version, &path.resource).ok_or_else(|| {
        ApiError::new(404, "NotFound", "the server could not find the requested resource")
    })?;
    let query = Query::parse(request.uri().query());
    let output = Output::negotiate(body::accept(&request));
    let kind = events::stored_kind(shown);
    let call = Call { server, kind, shown, path, query, output };
    if kind.namespaced && path.namespace.is_empty() && !path.name.is_empty() {
        return Err(ApiError::new(
            404,
            "NotFound",
            "the server could not find the requested resource",
        ));
    }
    match (path.subresource.as_str(), request.method()) {
        ("", &Method::GET | &Method::HEAD) => call.read().await,
        ("", &Method::POST) if path.name.is_empty() => call.create(request).await,
        ("" | "status" | "ephemeralcontainers" | "finalize", &Method::PUT) => {
            call.update(request).await
        }
        ("" | "status" | "ephemeralcontainers", &Method::PATCH) => call.patch(request).await,
        ("", &Method::DELETE) => call.delete(request).await,
        ("status" | "ephemeralcontainers", &Method::GET) => call.read().await,
        ("log" | "exec" | "attach" | "portforward", _) if *kind == kinds::POD => {
            kubelet::pod(server, request, path).await
        }
        ("proxy", _) if *kind == kinds::NODE => kubelet::node(server, request, path).await,
        (sub, _) => call.subresource(sub.to_owned(), request, identity).await,
    }
}

impl Call<'_> {
    fn write_options(&self) -> Result<WriteOptions, ApiError> {
        let dry_run = match self.query.get("dryRun") {
            None | Some("") => false,
            Some("All") => true,
            Some(other) => {
                let text =
                    format!("dryRun: Unsupported value: \"{other}\": supported values: \"All\"");
                return Err(ApiError::bad_request(text));
            }
        };
        let manager = self.query.text("fieldManager").to_owned();
        Ok(WriteOptions { dry_run, manager, force: self.query.is_true("force") })
    }

    pub(super) fn selector(&self) -> Result<Selector, ApiError> {
        let labels = self.query.text("labelSelector");
        Selector::parse(self.kind, labels, self.query.text("fieldSelector"))
    }

    /// The namespace to look in; a namespace's own name is no place.
    pub(super) fn namespace(&self) -> &str {
        if self.kind.namespaced { &self.path.namespace } else { "" }
    }

    async fn read(&self) -> Result<Reply, ApiError> {
        if self.path.name.is_empty() {
            if self.query.is_true("watch") { self.watch() } else { self.list() }
        } else if self.query.is_true("watch") {
            self.watch()
        } else {
            let object = self.server.registry.get(self.kind, self.namespace(), &self.path.name)?;
            self.show(StatusCode::OK, &object)
        }
    }

    fn list(&self) -> Result<Reply, ApiError> {
        let page = self.page()?;
        let mut meta = json!({"resourceVersion": page.revision.to_string()});
        if let Some(next) = &page.next {
            meta["continue"] = next.clone().into();
            meta["remainingItemCount"] = page.remaining.into();
        }
        if self.output == Output::Table {
            let include = self.query.text("includeObject");
            let mut shown = table::render(self.kind, &page.items, include, true);
            shown["metadata"] = meta;
            return Ok(body::json(StatusCode::OK, &shown));
        }
        let (list_kind, version) = match self.output {
            Output::Metadata => {
                ("PartialObjectMetadataList".to_owned(), "meta.k8s.io/v1".to_owned())
            }
            _ => (format!("{}List", self.shown.kind), self.shown.api_version()),
        };
        let mut text = format!(
            "{{\"kind\":\"{list_kind}\",\"apiVersion\":\"{version}\",\"metadata\":{meta},\"items\":["
        )
        .into_bytes();
        for (index, object) in page.items.iter().enumerate() {
            if index > 0 {
                text.push(b',');
            }
            match self.output {
                Output::Metadata => text.extend(partial(object).to_string().into_bytes()),
                _ => text.extend_from_slice(&events::wire(self.shown, object)),
            }
        }
        text.extend_from_slice(b"]}\n");
        Ok(body::bytes(StatusCode::OK, "application/json", text))
    }

    fn watch(&self) -> Result<Reply, ApiError> {
        watching::start(self)
    }

    pub(super) fn show(&self, status: StatusCode, object: &Arc<Object>) -> Result<Reply, ApiError> {
        Ok(match self.output {
            Output::Json => {
                body::bytes(status, "application/json", events::wire(self.shown, object))
            }
            Output::Metadata => body::json(status, &partial(object)),
            Output::Table => {
                let include = self.query.text("includeObject");
                let shown = table::render(self.kind, std::slice::from_ref(object), include, true);
                body::json(status, &shown)
            }
        })
    }

    /// Reads an object from a request: type, kind, unknown fields.
    fn take(&self, value: Value) -> Result<(Value, Vec<String>), ApiError> {
        let expected = (self.shown.api_version(), self.shown.kind);
        let have = (value["apiVersion"].as_str(), value["kind"].as_str());
        if have.0.is_some_and(|v| v != expected.0) || have.1.is_some_and(|k| k != expected.1) {
            let text = format!(
                "{} in version \"{}\" cannot be handled as a {}: the request's path needs kind {} of {}",
                have.1.unwrap_or_default(),
                have.0.unwrap_or_default(),
                self.shown.kind,
                expected.1,
                expected.0,
            );
            return Err(ApiError::bad_request(text));
        }
        let decoded = decode::decode(self.shown, &value)?;
        let unknown: Vec<_> =
            decoded.unknown.iter().map(|field| format!("unknown field \"{field}\"")).collect();
        let value = events::to_stored(self.shown, decoded.value);
        match self.query.get("fieldValidation") {
            Some("Strict") if !unknown.is_empty() => Err(ApiError::bad_request(format!(
                "{} in version \"{}\" cannot be handled as a {}: strict decoding error: {}",
                self.shown.kind,
                self.shown.version,
                self.shown.kind,
                unknown.join(", ")
            ))),
            Some("Ignore") => Ok((value, Vec::new())),
            None | Some("" | "Warn" | "Strict") => Ok((value, unknown)),
            Some(other) => Err(ApiError::bad_request(format!(
                "fieldValidation: Unsupported value: \"{other}\": supported values: \"Ignore\", \"Strict\", \"Warn\""
            ))),
        }
    }

    async fn create(&self, request: Request<Incoming>) -> Result<Reply, ApiError> {
        let media = body::media_type(&request);
        let value = body::parse(&media, &body::read(request.into_body()).await?)?;
        let (value, warnings) = self.take(value)?;
        if self.kind.namespaced {
            self.same("namespace", &value, &self.path.namespace)?;
        }
        let options = self.write_options()?;
        let made =
            self.server.registry.create_with(self.kind, self.namespace(), value, &options).await?;
        Ok(body::warn(self.show(StatusCode::CREATED, &made)?, &warnings))
    }

    /// A body must not speak of another object than its URL.
    fn same(&self, field: &str, value: &Value, url: &str) -> Result<(), ApiError> {
        match value["metadata"][field].as_str() {
            None | Some("") => Ok(()),
            Some(inside) if inside == url => Ok(()),
            Some(inside) => Err(ApiError::bad_request(format!(
                "the {field} of the provided object does not match the {field} sent on the request ({inside} instead of {url})"
            ))),
        }
    }

    async fn update(&self, request: Request<Incoming>) -> Result<Reply, ApiError> {
        let media = body::media_type(&request);
        let value = body::parse(&media, &body::read(request.into_body()).await?)?;
        let (mut value, warnings) = self.take(value)?;
        self.same("name", &value, &self.path.name)?;
        value["metadata"]["name"] = self.path.name.clone().into();
        if self.kind.namespaced {
            self.same("namespace", &value, &self.path.namespace)?;
            value["metadata"]["namespace"] = self.path.namespace.clone().into();
        }
        let options = self.write_options()?;
        let registry = &self.server.registry;
        let part = self.path.subresource.as_str().into();
        let updated = registry.update_with(self.kind, value, part, &options).await?;
        Ok(body::warn(self.show(StatusCode::OK, &updated)?, &warnings))
    }

    async fn patch(&self, request: Request<Incoming>) -> Result<Reply, ApiError> {
        let media = body::media_type(&request);
        let how = match media.as_str() {
            "application/json-patch+json" => PatchType::Json,
            "application/merge-patch+json" => PatchType::Merge,
            "application/strategic-merge-patch+json" => PatchType::Strategic,
            "application/apply-patch+yaml" | "application/apply-patch+json" => PatchType::Apply,
            other => {
                return Err(ApiError::new(
                    415,
                    "UnsupportedMediaType",
                    format!(
                        "the body of the request was in an unknown format {other} - accepted media types include: application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json, application/apply-patch+yaml"
                    ),
                ));
            }
        };
        let patch = body::parse(&media, &body::read(request.into_body()).await?)?;
        let patch = events::to_stored(self.shown, patch);
        let options = self.write_options()?;
        let strict = self.query.text("fieldValidation") == "Strict";
        let ignore = self.query.text("fieldValidation") == "Ignore";
        let target = Target {
            kind: self.kind,
            namespace: self.namespace(),
            name: &self.path.name,
            part: self.path.subresource.as_str().into(),
        };
        let registry = &self.server.registry;
        let patched = registry.patch_target(&target, how, &patch, strict, &options).await?;
        let status = if patched.created { StatusCode::CREATED } else { StatusCode::OK };
        let reply = self.show(status, &patched.object)?;
        Ok(if ignore { reply } else { body::warn(reply, &patched.unknown) })
    }

    async fn delete(&self, request: Request<Incoming>) -> Result<Reply, ApiError> {
        let media = body::media_type(&request);
        let bytes = body::read(request.into_body()).await?;
        let sent = if bytes.is_empty() { Value::Null } else { body::parse(&media, &bytes)? };
        let options = self.delete_options(&sent)?;
        let write = WriteOptions {
            dry_run: sent["dryRun"][0] == "All" || self.write_options()?.dry_run,
            ..WriteOptions::default()
        };
        let registry = &self.server.registry;
        if self.path.name.is_empty() {
            let page = self.page()?;
            for object in &page.items {
                let gone = registry
                    .delete_with(self.kind, &object.namespace, &object.name, &options, &write)
                    .await;
                if let Err(error) = gone
                    && !error.is_not_found()
                {
                    return Err(error);
                }
            }
            return self.list_of(&page.items, page.revision);
        }
        let (object, gone) = registry
            .delete_with(self.kind, self.namespace(), &self.path.name, &options, &write)
            .await?;
        // Pods and what waits for finalizers are shown; what is gone is confirmed.
        if gone && *self.kind != kinds::POD {
            return Ok(body::json(StatusCode::OK, &confirmation(self.kind, &object)));
        }
        self.show(StatusCode::OK, &object)
    }

    fn list_of(&self, items: &[Arc<Object>], revision: u64) -> Result<Reply, ApiError> {
        let items: Vec<Value> = items.iter().map(|o| o.value()).collect();
        Ok(body::json(
            StatusCode::OK,
            &json!({
                "kind": format!("{}List", self.kind.kind), "apiVersion": self.kind.api_version(),
                "metadata": {"resourceVersion": revision.to_string()}, "items": items,
            }),
        ))
    }

    fn delete_options(&self, sent: &Value) -> Result<DeleteOptions, ApiError> {
        let text = |v: &Value| v.as_str().filter(|s| !s.is_empty()).map(str::to_owned);
        let grace = match self.query.get("gracePeriodSeconds") {
            Some(n) => Some(n.parse().map_err(|_| {
                ApiError::bad_request(format!("gracePeriodSeconds: {n} is not a number of seconds"))
            })?),
            None => sent["gracePeriodSeconds"].as_i64(),
        };
        let policy = self.query.get("propagationPolicy").map(str::to_owned);
        let policy = policy.or_else(|| text(&sent["propagationPolicy"]));
        let orphans = sent["orphanDependents"].as_bool();
        let propagation = match policy.as_deref() {
            Some("Foreground") => Some(Propagation::Foreground),
            Some("Background") => Some(Propagation::Background),
            Some("Orphan") => Some(Propagation::Orphan),
            Some(other) => {
                return Err(ApiError::bad_request(format!(
                    "propagationPolicy: Unsupported value: \"{other}\": supported values: \"Foreground\", \"Background\", \"Orphan\""
                )));
            }
            None => orphans.map(|o| if o { Propagation::Orphan } else { Propagation::Background }),
        };
        let conditions = &sent["preconditions"];
        Ok(DeleteOptions {
            grace_period_seconds: grace,
            propagation,
            preconditions: Preconditions {
                uid: text(&conditions["uid"]),
                resource_version: text(&conditions["resourceVersion"]),
            },
        })
    }
}

fn confirmation(kind: &Kind, object: &Object) -> Value {
    let mut details = json!({
        "name": &*object.name, "kind": kind.plural, "uid": object.value()["metadata"]["uid"],
    });
    if !kind.group.is_empty() {
        details["group"] = kind.group.into();
    }
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details,
    })
}

pub(super) fn partial(object: &Object) -> Value {
    json!({
        "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
        "metadata": object.value()["metadata"],
    })
}
