//! `keelson image`: the node's images.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};

use crate::config::CgroupDriver;
use crate::image::garbage::format_size;
use crate::runtime::{Runtime, RuntimeOptions};
use crate::up::Layout;

/// Look after the node's images.
#[derive(Debug, Args)]
pub struct ImageArgs {
    #[command(subcommand)]
    verb: Verb,
    /// The node's name, as in `keelson up --name`
    #[arg(long, global = true, default_value = "keelson")]
    name: String,
    /// containerd's socket [default: the one of the node called --name, else /run/containerd/containerd.sock]
    #[arg(long, global = true, value_name = "SOCKET")]
    containerd: Option<PathBuf>,
    /// containerd namespace of the node's images
    #[arg(long, global = true, default_value = "keelson", value_name = "NAME")]
    containerd_namespace: String,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Take over every image of an OCI archive
    Import {
        /// A tar file with an index.json, as `docker save`, skopeo and buildah write it
        archive: PathBuf,
    },
    /// Fetch an image from its registry
    Pull {
        /// Its name
        image: String,
    },
    /// Remove names of images, and with its last tag an image
    #[command(visible_alias = "remove")]
    Rm {
        /// Names or ids (sha256:…)
        #[arg(required = true, value_name = "REF")]
        images: Vec<String>,
        /// Also those that containers use; these run on, but cannot be made anew
        #[arg(long)]
        force: bool,
    },
    /// Remove every image that no container uses and nobody pinned
    Prune,
    /// List the images
    #[command(visible_alias = "ls")]
    List,
}

impl ImageArgs {
    /// Does what was asked for.
    ///
    /// # Errors
    /// When containerd does not answer, or the image cannot be had.
    #[allow(clippy::print_stdout, reason = "its output is what this command is for")]
    pub async fn run(self) -> Result<()> {
        let runtime = Runtime::connect_for_images(self.options()).await?;
        match self.verb {
            Verb::Import { archive } => {
                for name in runtime.import_image(&archive).await? {
                    println!("{name}");
                }
            }
            Verb::Pull { image } => {
                println!("{}", runtime.pull_image(&image, &[]).await?.repo_digest)
            }
            Verb::Rm { images, force } => {
                let mut failed = Vec::new();
                for image in images {
                    match runtime.remove_reference(&image, force).await {
                        Ok(names) => names.iter().for_each(|name| println!("{name}")),
                        Err(error) => failed.push(error.to_string()),
                    }
                }
                if !failed.is_empty() {
                    bail!("{}", failed.join("\n"));
                }
            }
            Verb::Prune => {
                let mut freed = 0;
                for image in runtime.present_images().await? {
                    if !image.in_use && !image.pinned {
                        for name in runtime.remove_image(&image.id).await? {
                            println!("{name}");
                        }
                        freed += image.size;
                    }
                }
                println!("{} freed", format_size(freed));
            }
            Verb::List => {
                for image in runtime.list_images().await? {
                    println!("{}\t{}\t{}", image.names.join(","), image.digest, image.size);
                }
            }
        }
        Ok(())
    }

    fn options(&self) -> RuntimeOptions {
        let layout = Layout::named(&self.name);
        let own = layout.containerd_socket();
        let socket = self.containerd.clone().unwrap_or_else(|| {
            if own.exists() { own } else { PathBuf::from("/run/containerd/containerd.sock") }
        });
        RuntimeOptions {
            socket,
            namespace: self.containerd_namespace.clone(),
            root_dir: layout.state_dir.clone(),
            run_dir: layout.run_dir.clone(),
            cni_conf_dir: layout.cni_conf_dir(),
            cni_bin_dirs: Vec::new(),
            cgroup_driver: CgroupDriver::Cgroupfs,
            pull_netns: None,
            registry_config_dir: PathBuf::from("/etc/containerd/certs.d"),
            default_runtime: String::new(),
            log_max_bytes: 10 << 20,
            log_max_files: 5,
        }
    }
}
