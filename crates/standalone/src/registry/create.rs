//! How an object comes to be.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{Registry, WriteOptions, imagine, meta};
use crate::error::ApiError;
use crate::kinds::{self, Kind};
use crate::object::{Object, key};
use crate::{decode, defaults, validation};

/// How often a generated name may turn out to be taken.
const NAME_TRIES: usize = 8;

impl Registry {
    pub(crate) async fn create_with(
        &self,
        kind: &'static Kind,
        namespace: &str,
        value: Value,
        options: &WriteOptions,
    ) -> Result<Arc<Object>, ApiError> {
        let mut value = decode::decode(kind, &value)?.value;
        meta::begin(kind, namespace, &mut value)?;
        let prefix = meta::text(&value, "generateName").to_owned();
        let generated = meta::text(&value, "name").is_empty() && !prefix.is_empty();
        let tries = if generated { NAME_TRIES } else { 1 };
        if generated {
            meta::of(&mut value).insert("name".to_owned(), meta::generate(&prefix).into());
        }
        self.check_namespace(kind, namespace, meta::text(&value, "name"))?;
        reset_status(kind, &mut value);
        if *kind == kinds::POD {
            self.admit_pod(namespace, &mut value)?;
        }
        defaults::apply(kind, &mut value);
        if *kind == kinds::POD {
            defaults::new_pod(&mut value);
        }
        let name = meta::text(&value, "name").to_owned();
        let causes = validation::create(kind, &value);
        if !causes.is_empty() {
            return Err(ApiError::invalid(kind, &name, &causes));
        }
        if self.state().get(kind, &key(namespace_of(kind, namespace), &name)).is_some()
            && !generated
        {
            return Err(ApiError::already_exists(kind, &name));
        }
        // What was reserved is given back when the object is not stored.
        let reserved = if *kind == kinds::SERVICE {
            Some(self.inner.allocator.reserve(None, &mut value)?)
        } else {
            None
        };
        if options.dry_run {
            return Ok(imagine(kind, value, 0));
        }
        for _ in 0..tries {
            let name = meta::text(&value, "name").to_owned();
            let key = key(namespace_of(kind, namespace), &name);
            if let Some(object) = self.store_version(kind, key, 0, Some(value.clone())).await? {
                if let Some(reserved) = reserved {
                    reserved.keep();
                }
                self.after_create(kind, &name).await?;
                return Ok(object);
            }
            if generated {
                meta::of(&mut value).insert("name".to_owned(), meta::generate(&prefix).into());
            }
        }
        Err(ApiError::already_exists(kind, meta::text(&value, "name")))
    }

    fn check_namespace(&self, kind: &Kind, namespace: &str, name: &str) -> Result<(), ApiError> {
        if !kind.namespaced {
            return Ok(());
        }
        if namespace.is_empty() {
            return Err(ApiError::bad_request("an empty namespace may not be set during creation"));
        }
        let found = self.get(&kinds::NAMESPACE, "", namespace)?;
        if found.value()["status"]["phase"] == "Terminating" {
            let why = format!(
                "unable to create new content in namespace {namespace} because it is being terminated"
            );
            let mut error = ApiError::forbidden(kind, name, &why);
            error.details["causes"] = json!([{
                "reason": "NamespaceTerminating",
                "message": format!("namespace {namespace} is being terminated"),
                "field": "metadata.namespace",
            }]);
            return Err(error);
        }
        Ok(())
    }

    /// A namespace has its account from the first moment on: a pod that is made right after it needs
    /// that account.
    async fn after_create(&self, kind: &Kind, name: &str) -> Result<(), ApiError> {
        if *kind != kinds::NAMESPACE {
            return Ok(());
        }
        let account = json!({"metadata": {"name": "default"}});
        let options = WriteOptions::default();
        let made =
            Box::pin(self.create_with(&kinds::SERVICE_ACCOUNT, name, account, &options)).await;
        match made {
            Err(error) if !error.is_already_exists() && error.code != 403 => Err(error),
            _ => Ok(()),
        }
    }
}

fn namespace_of<'a>(kind: &Kind, namespace: &'a str) -> &'a str {
    if kind.namespaced { namespace } else { "" }
}

/// A new object has no status yet; only a node brings its own.
fn reset_status(kind: &Kind, value: &mut Value) {
    if !kind.has_status || *kind == kinds::NODE || *kind == kinds::PERSISTENT_VOLUME {
        return;
    }
    let status = if *kind == kinds::POD {
        json!({"phase": "Pending", "qosClass": defaults::qos_class(&value["spec"])})
    } else if *kind == kinds::NAMESPACE {
        json!({"phase": "Active"})
    } else if *kind == kinds::SERVICE {
        json!({"loadBalancer": {}})
    } else if *kind == kinds::PERSISTENT_VOLUME_CLAIM {
        json!({"phase": "Pending"})
    } else if *kind == kinds::REPLICA_SET {
        json!({"replicas": 0})
    } else {
        json!({})
    };
    value["status"] = status;
}
