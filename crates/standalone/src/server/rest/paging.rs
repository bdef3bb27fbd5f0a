//! Lists in pages, and lists of the past.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use super::Call;
use crate::error::ApiError;
use crate::object::Object;

/// One page of a list.
pub(crate) struct Page {
    pub(crate) items: Vec<Arc<Object>>,
    pub(crate) revision: u64,
    pub(crate) next: Option<String>,
    pub(crate) remaining: usize,
}

impl Call<'_> {
    /// The page that the query asks for. All pages of a list show the same revision: the history is
    /// undone up to it, and when it does not reach so far the client starts again (410).
    pub(crate) fn page(&self) -> Result<Page, ApiError> {
        let limit = self.number("limit")?.unwrap_or(0);
        let (revision, after) = match self.query.get("continue").filter(|c| !c.is_empty()) {
            Some(token) => {
                let (revision, after) = read_token(token).ok_or_else(|| {
                    ApiError::bad_request("continue key is not valid: list again without it")
                })?;
                (Some(revision), after)
            }
            None => (self.wanted_revision()?, String::new()),
        };
        let mut selector = self.selector()?;
        if !self.path.name.is_empty() && !self.kind.namespaced {
            selector.and_name(&self.path.name);
        }
        let (mut items, revision) = match revision {
            Some(at) => {
                let state = self.server.registry.state();
                let listing = state.list_at(self.kind, self.namespace(), at)?;
                let items = listing.items.into_iter().filter(|o| selector.matches(o)).collect();
                (items, listing.revision)
            }
            None => self.server.registry.list(self.kind, self.namespace(), &selector),
        };
        if !after.is_empty() {
            items.retain(|o: &Arc<Object>| o.key() > after);
        }
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let remaining = if limit == 0 { 0 } else { items.len().saturating_sub(limit) };
        if remaining > 0 {
            items.truncate(limit);
        }
        let next = (remaining > 0)
            .then(|| items.last().map(|last| make_token(revision, &last.key())))
            .flatten();
        Ok(Page { items, revision, next, remaining })
    }

    pub(crate) fn number(&self, name: &str) -> Result<Option<u64>, ApiError> {
        match self.query.get(name).filter(|text| !text.is_empty()) {
            None => Ok(None),
            Some(text) => text.parse().map(Some).map_err(|_| {
                ApiError::bad_request(format!(
                    "{name}: Invalid value: \"{text}\": must be a number"
                ))
            }),
        }
    }

    /// A revision only when the list must be exactly of it; "not older than" is what the newest is.
    fn wanted_revision(&self) -> Result<Option<u64>, ApiError> {
        let revision = self.number("resourceVersion")?;
        match self.query.text("resourceVersionMatch") {
            "Exact" => revision.map(Some).ok_or_else(|| {
                ApiError::bad_request("resourceVersionMatch=Exact needs a resourceVersion")
            }),
            "" | "NotOlderThan" => {
                let state = self.server.registry.state();
                match revision {
                    Some(future) if future > state.revision => {
                        state.list_at(self.kind, self.namespace(), future).map(|_| None)
                    }
                    _ => Ok(None),
                }
            }
            other => Err(ApiError::bad_request(format!(
                "resourceVersionMatch: Unsupported value: \"{other}\": supported values: \"Exact\", \"NotOlderThan\""
            ))),
        }
    }
}

fn make_token(revision: u64, key: &str) -> String {
    URL_SAFE_NO_PAD.encode(json!({"v": "keelson", "rv": revision, "start": key}).to_string())
}

pub(crate) fn read_token(token: &str) -> Option<(u64, String)> {
    let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
    let value: Value = serde_json::from_slice(&bytes).ok()?;
    Some((value["rv"].as_u64()?, value["start"].as_str()?.to_owned()))
}
