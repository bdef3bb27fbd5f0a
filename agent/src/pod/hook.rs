//! Lifecycle hooks: what a container wants done right after its start and before its end.

use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, HTTPGetAction, LifecycleHandler};
use tokio::net::TcpStream;

use super::shared::Node;
use super::{exec, http};

/// Runs one hook.
///
/// # Errors
/// In words, for the event `FailedPostStartHook` or `FailedPreStopHook`.
pub(super) async fn run(
    node: &Node,
    container: &Container,
    container_id: &str,
    pod_ip: Option<IpAddr>,
    hook: &LifecycleHandler,
    limit: Duration,
) -> Result<(), String> {
    let work = perform(node, container, container_id, pod_ip, hook, limit);
    match tokio::time::timeout(limit, work).await {
        Ok(done) => done,
        Err(_) => Err(format!("hook took longer than {} s", limit.as_secs())),
    }
}

async fn perform(
    node: &Node,
    container: &Container,
    container_id: &str,
    pod_ip: Option<IpAddr>,
    hook: &LifecycleHandler,
    limit: Duration,
) -> Result<(), String> {
    if let Some(action) = &hook.exec {
        let command = action.command.clone().unwrap_or_default();
        let outcome =
            exec::run(node, container_id, &command, limit).await.map_err(|e| e.to_string())?;
        return match outcome.code {
            0 => Ok(()),
            code => Err(format!("command {command:?} exited with {code}: {}", outcome.output)),
        };
    }
    if let Some(action) = &hook.http_get {
        return http_hook(action, container, pod_ip).await;
    }
    if let Some(action) = &hook.sleep {
        let secs = u64::try_from(action.seconds).unwrap_or(0);
        tokio::time::sleep(Duration::from_secs(secs)).await;
        return Ok(());
    }
    if let Some(action) = &hook.tcp_socket {
        let port = http::port(&action.port, container)?;
        let host = action.host.clone().or_else(|| pod_ip.map(|ip| ip.to_string()));
        let host = host.ok_or("the pod has no address")?;
        return TcpStream::connect((host, port)).await.map(drop).map_err(|e| e.to_string());
    }
    Ok(())
}

/// A hook that was told to use HTTPS and meets a plain server asks again in plain, without credentials.
async fn http_hook(
    action: &HTTPGetAction,
    container: &Container,
    pod_ip: Option<IpAddr>,
) -> Result<(), String> {
    let first = http::get(action, container, pod_ip).await;
    let tls = action.scheme.as_deref().is_some_and(|s| s.eq_ignore_ascii_case("https"));
    let answer = match first {
        Err(error) if tls && error.contains("TLS") => {
            let mut plain = action.clone();
            plain.scheme = Some("HTTP".into());
            let headers = plain.http_headers.iter_mut();
            headers.for_each(|list| list.retain(|h| !h.name.eq_ignore_ascii_case("authorization")));
            http::get(&plain, container, pod_ip).await?
        }
        other => other?,
    };
    // As kubelet has it: any answer will do, an error status is the application's own affair.
    tracing::trace!(status = answer.status, "Hook answered");
    Ok(())
}
