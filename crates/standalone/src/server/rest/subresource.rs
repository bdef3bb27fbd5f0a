//! Subresources with a body of another kind: binding, eviction, scale, token.

use http::{Method, Request, StatusCode};
use hyper::body::Incoming;
use serde_json::{Value, json};

use super::Call;
use crate::auth::Identity;
use crate::auth::token::{Claims, ISSUER};
use crate::error::ApiError;
use crate::kinds;
use crate::registry::{PatchType, Target, bounded_patch};
use crate::server::{Reply, body};

/// A token lives at least ten minutes, an hour unless asked otherwise, and at most a day.
const TOKEN_SECONDS: (i64, i64, i64) = (600, 3600, 86_400);

impl Call<'_> {
    pub(super) async fn subresource(
        &self,
        name: String,
        request: Request<Incoming>,
        _identity: &Identity,
    ) -> Result<Reply, ApiError> {
        let method = request.method().clone();
        let media = body::media_type(&request);
        let scalable = *self.kind == kinds::DEPLOYMENT || *self.kind == kinds::REPLICA_SET;
        let bytes = body::read(request.into_body()).await?;
        let sent = || body::parse(&media, &bytes);
        match (name.as_str(), method) {
            ("binding", Method::POST) if *self.kind == kinds::POD => self.bind(&sent()?).await,
            ("eviction", Method::POST) if *self.kind == kinds::POD => self.evict(&sent()?).await,
            ("token", Method::POST) if *self.kind == kinds::SERVICE_ACCOUNT => self.token(sent()?),
            ("scale", Method::GET) if scalable => self.scale(),
            ("scale", Method::PUT) if scalable => self.set_scale(&sent()?).await,
            ("scale", Method::PATCH) if scalable => {
                let current =
                    self.server.registry.get(self.kind, self.namespace(), &self.path.name)?;
                let mut scale = scale_of(&current.value());
                match media.as_str() {
                    "application/json-patch+json" => bounded_patch::apply(&mut scale, sent()?)?,
                    _ => json_patch::merge(&mut scale, &sent()?),
                }
                self.set_scale(&scale).await
            }
            (_, method) => Err(ApiError::new(
                if method == Method::GET { 404 } else { 405 },
                if method == Method::GET { "NotFound" } else { "MethodNotAllowed" },
                "the server could not find the requested resource",
            )),
        }
    }

    async fn bind(&self, binding: &Value) -> Result<Reply, ApiError> {
        let node = binding["target"]["name"].as_str().unwrap_or_default();
        if node.is_empty() {
            return Err(ApiError::bad_request("target.name: Required value"));
        }
        self.server.registry.bind(self.namespace(), &self.path.name, node).await?;
        Ok(created())
    }

    async fn evict(&self, eviction: &Value) -> Result<Reply, ApiError> {
        let options = self.delete_options(&eviction["deleteOptions"])?;
        let write = self.write_options()?;
        let registry = &self.server.registry;
        registry.evict(self.namespace(), &self.path.name, &options, &write).await?;
        Ok(created())
    }

    fn scale(&self) -> Result<Reply, ApiError> {
        let object = self.server.registry.get(self.kind, self.namespace(), &self.path.name)?;
        Ok(body::json(StatusCode::OK, &scale_of(&object.value())))
    }

    async fn set_scale(&self, scale: &Value) -> Result<Reply, ApiError> {
        let Some(replicas) = scale["spec"]["replicas"].as_i64().or(Some(0)).filter(|n| *n >= 0)
        else {
            return Err(ApiError::bad_request("spec.replicas: must be greater than or equal to 0"));
        };
        let mut patch = json!({"spec": {"replicas": replicas}});
        if let Some(version) =
            scale["metadata"]["resourceVersion"].as_str().filter(|v| !v.is_empty())
        {
            patch["metadata"] = json!({"resourceVersion": version});
        }
        let target = Target {
            kind: self.kind,
            namespace: self.namespace(),
            name: &self.path.name,
            part: "".into(),
        };
        let options = self.write_options()?;
        let registry = &self.server.registry;
        let patched =
            registry.patch_target(&target, PatchType::Merge, &patch, false, &options).await?;
        Ok(body::json(StatusCode::OK, &scale_of(&patched.object.value())))
    }

    /// A token for a service account, perhaps bound to a pod of it.
    fn token(&self, mut request: Value) -> Result<Reply, ApiError> {
        let registry = &self.server.registry;
        let (namespace, name) = (self.namespace(), self.path.name.as_str());
        let account = registry.get(&kinds::SERVICE_ACCOUNT, namespace, name)?.value();
        if !matches!(request.get("spec"), None | Some(Value::Object(_) | Value::Null)) {
            return Err(ApiError::bad_request("spec: expected an object"));
        }
        let spec = &request["spec"];
        let bound = &spec["boundObjectRef"];
        let pod = (bound["kind"] == "Pod").then(|| bound["name"].as_str().unwrap_or_default());
        let pod = pod.map(|pod| registry.get(&kinds::POD, namespace, pod)).transpose()?;
        let uid = pod
            .as_ref()
            .map(|p| p.value()["metadata"]["uid"].as_str().unwrap_or_default().to_owned());
        if let (Some(has), Some(wanted)) = (&uid, bound["uid"].as_str())
            && has != wanted
            && !wanted.is_empty()
        {
            let why = format!(
                "the UID in the bound object reference ({wanted}) does not match the UID in record. The object might have been deleted and then recreated"
            );
            return Err(ApiError::conflict(
                &kinds::POD,
                bound["name"].as_str().unwrap_or_default(),
                &why,
            ));
        }
        let audiences: Vec<String> = match spec["audiences"].as_array() {
            Some(list) if !list.is_empty() => {
                list.iter().filter_map(|a| a.as_str().map(str::to_owned)).collect()
            }
            _ => vec![ISSUER.to_owned()],
        };
        let (least, usual, most) = TOKEN_SECONDS;
        let lifetime_secs = spec["expirationSeconds"].as_i64().unwrap_or(usual);
        if lifetime_secs < least {
            let cause = crate::error::Cause::invalid(
                "spec.expirationSeconds",
                &json!(lifetime_secs),
                "may not specify a duration less than 10 minutes",
            );
            let mut error = ApiError::invalid(&kinds::SERVICE_ACCOUNT, name, &[cause]);
            error.message =
                error.message.replacen("ServiceAccount", "TokenRequest.authentication.k8s.io", 1);
            return Err(error);
        }
        let lifetime_secs = lifetime_secs.min(most);
        let claims = Claims {
            namespace,
            account: name,
            account_uid: account["metadata"]["uid"].as_str().unwrap_or_default(),
            pod: pod.as_ref().zip(uid.as_ref()).map(|(p, uid)| (&*p.name, uid.as_str())),
            audiences: audiences.clone(),
            lifetime_secs,
        };
        let token = self.server.tokens.issue(&claims);
        let token = token.map_err(|_| ApiError::internal("the token could not be signed"))?;
        let expires =
            jiff::Timestamp::from_second(jiff::Timestamp::now().as_second() + lifetime_secs);
        request["spec"]["audiences"] = json!(audiences);
        request["spec"]["expirationSeconds"] = lifetime_secs.into();
        request["kind"] = "TokenRequest".into();
        request["apiVersion"] = "authentication.k8s.io/v1".into();
        request["metadata"] = json!({"name": name, "namespace": namespace, "creationTimestamp": crate::registry::now()});
        request["status"] = json!({
            "token": token,
            "expirationTimestamp": expires.unwrap_or_default().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        });
        Ok(body::json(StatusCode::CREATED, &request))
    }
}

fn created() -> Reply {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201,
    });
    body::json(StatusCode::CREATED, &status)
}

/// `autoscaling/v1 Scale` of a workload.
fn scale_of(object: &Value) -> Value {
    let meta = &object["metadata"];
    let labels = object["spec"]["selector"]["matchLabels"].as_object();
    let selector: Vec<String> = labels
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect();
    json!({
        "kind": "Scale", "apiVersion": "autoscaling/v1",
        "metadata": {
            "name": meta["name"], "namespace": meta["namespace"], "uid": meta["uid"],
            "resourceVersion": meta["resourceVersion"], "creationTimestamp": meta["creationTimestamp"],
        },
        "spec": {"replicas": object["spec"]["replicas"]},
        "status": {
            "replicas": object["status"]["replicas"].as_i64().unwrap_or(0),
            "selector": selector.join(","),
        },
    })
}
