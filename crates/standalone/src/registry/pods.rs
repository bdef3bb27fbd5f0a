//! What is special about pods: service accounts, binding, eviction.

use serde_json::{Value, json};

use super::{DeleteOptions, Part, Registry, WriteOptions, meta};
use crate::error::ApiError;
use crate::kinds;

/// Where a pod's containers find the account's token.
const TOKEN_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// How long such a token lives; with a little more than an hour, clients may renew hourly.
const TOKEN_SECONDS: i64 = 3607;

impl Registry {
    /// Assigns a pod to a node, and says so in its condition `PodScheduled`.
    ///
    /// # Errors
    /// 404, 409 when it has a node already.
    pub async fn bind(&self, namespace: &str, name: &str, node: &str) -> Result<(), ApiError> {
        let kind = &kinds::POD;
        loop {
            let current = self.get(kind, namespace, name)?;
            let mut pod = current.value();
            let assigned = pod["spec"]["nodeName"].as_str().unwrap_or_default();
            if !assigned.is_empty() {
                let why = format!("pod {name} is already assigned to node \"{assigned}\"");
                return Err(ApiError::conflict(kind, name, &why));
            }
            if meta::is_terminating(&pod) {
                let why = format!("pod {name} is being deleted, cannot be assigned to a host");
                return Err(ApiError::conflict(kind, name, &why));
            }
            pod["spec"]["nodeName"] = node.into();
            set_condition(
                &mut pod,
                json!({
                    "type": "PodScheduled", "status": "True", "lastProbeTime": null,
                    "lastTransitionTime": meta::now(),
                }),
            );
            let generation = pod["metadata"]["generation"].as_i64().unwrap_or(0) + 1;
            meta::of(&mut pod).insert("generation".to_owned(), generation.into());
            let key = current.key();
            if self.store_version(kind, key, current.revision, Some(pod)).await?.is_some() {
                return Ok(());
            }
        }
    }

    /// Deletes a pod because somebody wants it away from its node.
    pub(crate) async fn evict(
        &self,
        namespace: &str,
        name: &str,
        options: &DeleteOptions,
        write: &WriteOptions,
    ) -> Result<(), ApiError> {
        loop {
            let current = self.get(&kinds::POD, namespace, name)?;
            let mut pod = current.value();
            set_condition(
                &mut pod,
                json!({
                    "type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI",
                    "message": "Eviction API: evicting", "lastTransitionTime": meta::now(),
                    "lastProbeTime": null,
                }),
            );
            let marked = self.replace(&current, pod, Part::Status, write.dry_run).await?;
            if marked.is_some() {
                break;
            }
        }
        self.delete_with(&kinds::POD, namespace, name, options, write).await.map(|_| ())
    }

    /// The service account of a new pod, and the volume with its token.
    pub(super) fn admit_pod(&self, namespace: &str, pod: &mut Value) -> Result<(), ApiError> {
        if !pod["metadata"]["annotations"]["kubernetes.io/config.mirror"].is_null() {
            return Ok(());
        }
        let name = meta::text(pod, "name").to_owned();
        let spec = &mut pod["spec"];
        if !spec.is_object() {
            return Ok(());
        }
        let legacy = spec["serviceAccount"].as_str().unwrap_or_default().to_owned();
        let account = match spec["serviceAccountName"].as_str().unwrap_or_default() {
            "" if legacy.is_empty() => "default".to_owned(),
            "" => legacy,
            named => named.to_owned(),
        };
        spec["serviceAccountName"] = account.clone().into();
        let found = self.get(&kinds::SERVICE_ACCOUNT, namespace, &account).map_err(|error| {
            let why = format!("error looking up service account {namespace}/{account}: {error}");
            ApiError::forbidden(&kinds::POD, &name, &why)
        })?;
        let found = found.value();
        if spec["imagePullSecrets"].as_array().is_none_or(Vec::is_empty)
            && !found["imagePullSecrets"].is_null()
        {
            spec["imagePullSecrets"] = found["imagePullSecrets"].clone();
        }
        let mounts = spec["automountServiceAccountToken"]
            .as_bool()
            .or_else(|| found["automountServiceAccountToken"].as_bool())
            .unwrap_or(true);
        if mounts {
            mount_token(spec);
        }
        Ok(())
    }
}

fn mount_token(spec: &mut Value) {
    let volume = format!("kube-api-access-{}", meta::generate(""));
    let mount = json!({"name": volume, "mountPath": TOKEN_PATH, "readOnly": true});
    let mut used = false;
    for list in ["initContainers", "containers"] {
        let Some(containers) = spec[list].as_array_mut() else { continue };
        for container in containers.iter_mut().filter(|c| c.is_object()) {
            let mounts = &mut container["volumeMounts"];
            if !mounts.is_array() {
                *mounts = json!([]);
            }
            let Some(mounts) = mounts.as_array_mut() else { continue };
            if mounts.iter().all(|m| m["mountPath"] != TOKEN_PATH) {
                mounts.push(mount.clone());
                used = true;
            }
        }
    }
    if !used {
        return;
    }
    let source = json!({"name": volume, "projected": {"defaultMode": 420, "sources": [
        {"serviceAccountToken": {"path": "token", "expirationSeconds": TOKEN_SECONDS}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {"downwardAPI": {"items": [{
            "path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"},
        }]}},
    ]}});
    match spec["volumes"].as_array_mut() {
        Some(volumes) => volumes.push(source),
        None => spec["volumes"] = json!([source]),
    }
}

fn set_condition(pod: &mut Value, condition: Value) {
    if !pod["status"].is_object() {
        pod["status"] = json!({});
    }
    match pod["status"]["conditions"].as_array_mut() {
        Some(list) => {
            list.retain(|c| c["type"] != condition["type"]);
            list.push(condition);
        }
        None => pod["status"]["conditions"] = json!([condition]),
    }
}
