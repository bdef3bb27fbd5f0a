//! Images, seen together with the containers that need them.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use containerd_client::services::v1::PluginsRequest;

use super::container::SNAPSHOTTER;
use super::record::Record;
use super::types::PodId;
use super::{Inner, RuntimeError, observe};
use crate::image::ListedImage;
use crate::image::garbage::{Disk, Present};

/// Ids of images, and names of such as other people's containers have; each with one that uses it.
struct Users(HashMap<String, String>);

impl Users {
    async fn of(inner: &Inner) -> Result<Users, RuntimeError> {
        let containers = observe::list(inner, Vec::new()).await?;
        let user =
            |container: containerd_client::services::v1::Container| match Record::of(&container) {
                Some(Record::Sandbox(_)) => None,
                Some(Record::Container(record)) => {
                    let pod = PodId::from(&record.pod);
                    let (name, pod) = (record.name, format!("{}/{}", pod.namespace, pod.name));
                    Some((record.image_id, format!("container {name} of pod {pod}")))
                }
                None => Some((container.image, format!("container {}", container.id))),
            };
        Ok(Users(containers.into_iter().filter_map(user).collect()))
    }

    fn of_image(&self, image: &ListedImage) -> Option<&str> {
        let names = [&image.id].into_iter().chain(&image.names);
        names.filter_map(|name| self.0.get(name)).map(String::as_str).next()
    }
}

pub(super) async fn present(inner: &Arc<Inner>) -> Result<Vec<Present>, RuntimeError> {
    // Listed before the containers: one that is made meanwhile is seen.
    let images = inner.images.list().await?;
    let users = Users::of(inner).await?;
    let mut by_id: HashMap<String, Present> = HashMap::new();
    for image in images {
        let (in_use, pinned) = (users.of_image(&image).is_some(), image.pinned);
        let fresh = Present { id: image.id.clone(), size: image.size, in_use, pinned };
        let known = by_id.entry(image.id).or_insert(fresh);
        known.in_use |= in_use;
        known.pinned |= pinned;
    }
    Ok(by_id.into_values().collect())
}

pub(super) async fn remove_reference(
    inner: &Arc<Inner>,
    reference: &str,
    force: bool,
) -> Result<Vec<String>, RuntimeError> {
    let image = inner.images.find(reference).await?;
    let users = Users::of(inner).await?;
    if let Some(user) = users.of_image(&image).filter(|_| !force) {
        return Err(RuntimeError::Image {
            message: format!(
                "image {reference} is used by {user}; hint: --force takes its names away all the same"
            ),
        });
    }
    inner.images.remove_reference(reference, &image).await
}

pub(super) async fn disk(inner: &Arc<Inner>) -> Result<Disk, RuntimeError> {
    let filter = format!("type==io.containerd.snapshotter.v1,id=={SNAPSHOTTER}");
    let request = PluginsRequest { filters: vec![filter] };
    let reply = inner.connection.introspection().plugins(request).await;
    let plugins =
        reply.map_err(RuntimeError::call("describe", "its plugins"))?.into_inner().plugins;
    let root = plugins.into_iter().find_map(|mut plugin| plugin.exports.remove("root"));
    let root = root.map(PathBuf::from).ok_or_else(|| {
        RuntimeError::invalid(format!(
            "containerd does not say where the {SNAPSHOTTER} snapshotter is"
        ))
    })?;
    let stat = nix::sys::statvfs::statvfs(&root)
        .map_err(|errno| RuntimeError::system("ask for the free space of", &root)(errno.into()))?;
    Ok(Disk {
        capacity: stat.blocks() * stat.fragment_size(),
        available: stat.blocks_available() * stat.fragment_size(),
    })
}
