//! Where pods come from. Every source tells full truths about single pods, and once its whole content.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;

pub(super) mod api;
pub(crate) mod manifests;

/// Which source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum SourceKind {
    Api,
    Manifests,
}

/// What a source says.
#[derive(Debug, Clone)]
pub(super) enum Update {
    /// The whole content: whatever else was known of this source is gone.
    All(SourceKind, Vec<Arc<Pod>>),
    Changed(SourceKind, Arc<Pod>),
    Gone(Arc<Pod>),
}
