//! What the files of config map, secret, downward API and projected volumes contain. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{DownwardAPIVolumeFile, KeyToPath, Pod, Volume, VolumeProjection};

use super::atomic::{self, File, Files};
use crate::env::{FieldContext, Keys, Objects, fields::FieldError};
use crate::pod::spec;

/// Tokens that were requested for this pod, by volume name and path.
pub type Tokens = BTreeMap<(String, String), String>;

/// What the content is made from.
#[derive(Debug, Clone, Copy)]
pub struct ContentContext<'a> {
    pub objects: &'a Objects,
    pub fields: &'a FieldContext<'a>,
    pub tokens: &'a Tokens,
}

/// Why the content cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    #[error("{kind} \"{name}\" not found")]
    NoObject { kind: &'static str, name: String },
    #[error("{kind} \"{name}\" has no key \"{key}\"")]
    NoKey { kind: &'static str, name: String, key: String },
    #[error("path \"{path}\" may not be absolute nor contain or begin with \"..\"")]
    UnsafePath { path: String },
    #[error("the token for \"{path}\" has not been issued yet")]
    NoToken { path: String },
    #[error(transparent)]
    Field(#[from] FieldError),
    #[error("{kind} projections are not supported by this node")]
    Unsupported { kind: &'static str },
}

const DEFAULT_MODE: i32 = 0o644;

/// The files of one volume.
pub(super) fn files(
    pod: &Pod,
    volume: &Volume,
    context: &ContentContext,
) -> Result<Files, ContentError> {
    let mut content =
        Content { pod, context, volume: &volume.name, files: Files::new(), mode: DEFAULT_MODE };
    if let Some(source) = &volume.config_map {
        content.mode = source.default_mode.unwrap_or(DEFAULT_MODE);
        let items = source.items.as_deref();
        content.config_map(&source.name, items, source.optional)?;
    } else if let Some(source) = &volume.secret {
        content.mode = source.default_mode.unwrap_or(DEFAULT_MODE);
        let name = source.secret_name.as_deref().unwrap_or_default();
        content.secret(name, source.items.as_deref(), source.optional)?;
    } else if let Some(source) = &volume.downward_api {
        content.mode = source.default_mode.unwrap_or(DEFAULT_MODE);
        content.downward(source.items.as_deref())?;
    } else if let Some(source) = &volume.projected {
        content.mode = source.default_mode.unwrap_or(DEFAULT_MODE);
        for projection in source.sources.iter().flatten() {
            content.projection(projection)?;
        }
    }
    match content.files.keys().find(|path| !atomic::is_safe(path)) {
        Some(path) => Err(ContentError::UnsafePath { path: path.clone() }),
        None => Ok(content.files),
    }
}

struct Content<'a> {
    pod: &'a Pod,
    context: &'a ContentContext<'a>,
    volume: &'a str,
    files: Files,
    mode: i32,
}

impl Content<'_> {
    fn add(&mut self, path: &str, data: Vec<u8>, mode: Option<i32>) {
        let mode = u32::try_from(mode.unwrap_or(self.mode)).unwrap_or(0o644) & 0o777;
        self.files.insert(path.trim_end_matches('/').to_owned(), File { mode, data });
    }

    fn config_map(
        &mut self,
        name: &str,
        items: Option<&[KeyToPath]>,
        optional: Option<bool>,
    ) -> Result<(), ContentError> {
        let found = self.context.objects.config_maps.get(name).cloned().flatten();
        self.keys("configmap", name, found, items, optional == Some(true))
    }

    fn secret(
        &mut self,
        name: &str,
        items: Option<&[KeyToPath]>,
        optional: Option<bool>,
    ) -> Result<(), ContentError> {
        let found = self.context.objects.secrets.get(name).cloned().flatten();
        self.keys("secret", name, found, items, optional == Some(true))
    }

    fn keys(
        &mut self,
        kind: &'static str,
        name: &str,
        found: Option<Arc<Keys>>,
        items: Option<&[KeyToPath]>,
        optional: bool,
    ) -> Result<(), ContentError> {
        let Some(keys) = found else {
            return match optional {
                true => Ok(()),
                false => Err(ContentError::NoObject { kind, name: name.to_owned() }),
            };
        };
        let Some(items) = items.filter(|items| !items.is_empty()) else {
            for (key, data) in keys.iter() {
                self.add(key, data.clone(), None);
            }
            return Ok(());
        };
        for item in items {
            match keys.get(&item.key) {
                Some(data) => self.add(&item.path, data.clone(), item.mode),
                None if optional => {}
                None => {
                    let (name, key) = (name.to_owned(), item.key.clone());
                    return Err(ContentError::NoKey { kind, name, key });
                }
            }
        }
        Ok(())
    }

    fn downward(&mut self, items: Option<&[DownwardAPIVolumeFile]>) -> Result<(), ContentError> {
        for item in items.unwrap_or_default() {
            let fields = self.context.fields;
            let text = if let Some(field) = &item.field_ref {
                fields.field(self.pod, &field.field_path)?
            } else if let Some(resource) = &item.resource_field_ref {
                fields.resource(self.pod, None, resource)?
            } else {
                continue;
            };
            self.add(&item.path, text.into_bytes(), item.mode);
        }
        Ok(())
    }

    fn projection(&mut self, source: &VolumeProjection) -> Result<(), ContentError> {
        if let Some(config_map) = &source.config_map {
            self.config_map(&config_map.name, config_map.items.as_deref(), config_map.optional)?;
        }
        if let Some(secret) = &source.secret {
            self.secret(&secret.name, secret.items.as_deref(), secret.optional)?;
        }
        if let Some(downward) = &source.downward_api {
            self.downward(downward.items.as_deref())?;
        }
        if let Some(token) = &source.service_account_token {
            let key = (self.volume.to_owned(), token.path.clone());
            let text = self.context.tokens.get(&key).cloned();
            let text = text.ok_or_else(|| ContentError::NoToken { path: token.path.clone() })?;
            self.add(&token.path, text.into_bytes(), Some(token_mode(self.pod, self.mode)));
        }
        if source.cluster_trust_bundle.is_some() {
            return Err(ContentError::Unsupported { kind: "clusterTrustBundle" });
        }
        if source.pod_certificate.is_some() {
            return Err(ContentError::Unsupported { kind: "podCertificate" });
        }
        Ok(())
    }
}

/// Tokens are secrets: readable by the pod's group when it has one, by its user only when all containers share one, else by
/// whoever the default mode allows.
fn token_mode(pod: &Pod, default: i32) -> i32 {
    let security = spec::spec(pod).and_then(|s| s.security_context.as_ref());
    match security.and_then(|s| s.fs_group) {
        Some(_) => 0o640,
        None => default,
    }
}

/// Names of the config maps and secrets that a pod's volumes refer to.
pub fn references(pod: &Pod) -> (Vec<String>, Vec<String>) {
    let (mut config_maps, mut secrets) = (Vec::new(), Vec::new());
    for volume in spec::spec(pod).and_then(|s| s.volumes.as_deref()).unwrap_or_default() {
        config_maps.extend(volume.config_map.as_ref().map(|s| s.name.clone()));
        secrets.extend(volume.secret.as_ref().and_then(|s| s.secret_name.clone()));
        for source in volume.projected.iter().flat_map(|p| p.sources.iter().flatten()) {
            config_maps.extend(source.config_map.as_ref().map(|s| s.name.clone()));
            secrets.extend(source.secret.as_ref().map(|s| s.name.clone()));
        }
    }
    (config_maps, secrets)
}
