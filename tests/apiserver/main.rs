//! The node against kube-apiserver: node authorizer, admission, certificates and API machinery as clusters have them.
//!
//! Needs the programs of envtest: the folder that has kube-apiserver and etcd in `KUBEBUILDER_ASSETS`. There is no
//! scheduler and no controller here, so the tests bind pods and write EndpointSlices themselves.
#![allow(clippy::unwrap_used, reason = "a test ends where something that it needs does not hold")]

mod access;
mod bootstrap;
mod cluster;
mod outage;
mod pods;
mod services;
