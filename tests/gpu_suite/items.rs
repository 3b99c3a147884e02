//! What the suite asks, the most important first.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use kernels::{Cuda, CudaOptions, KvDtype, WeightType};

use crate::battery::collective::{self, Groups};
use crate::battery::cuda::CHECKS;
use crate::{attention, bulk, logits, models, products, steps};

/// Where and how large.
#[derive(Debug, Clone)]
pub(crate) struct Setting {
    /// Where CUDA's libraries are looked for first.
    pub(crate) libraries: Option<PathBuf>,
    /// Shapes for an emulator.
    pub(crate) is_small: bool,
    /// Where what one process finds out of the GPU waits for the next one.
    pub(crate) cache: PathBuf,
}

impl Setting {
    pub(crate) fn cuda(&self, weights: WeightType, kv: KvDtype, is_deterministic: bool) -> Result<Cuda> {
        let options = CudaOptions {
            device: 0,
            weights,
            kv,
            is_deterministic,
            has_graphs: true,
            ffn_columns: Cuda::FFN_COLUMNS,
            libraries: self.libraries.clone(),
            cubins: Some(self.cache.clone()),
        };
        Ok(Cuda::new(options)?)
    }
}

/// Headings of the results, in order.
pub(crate) const SECTIONS: [&str; 9] =
    ["Device", "Battery", "Collectives", "Logits", "Models", "Steps", "Jobs", "Products", "Attention"];

/// An item's lines of Markdown.
type Run = Box<dyn Fn(&Setting) -> Result<Vec<String>>>;

/// A question.
pub(crate) struct Item {
    pub(crate) section: &'static str,
    pub(crate) name: String,
    /// What it is to reach.
    pub(crate) bar: &'static str,
    /// It is not begun with less time than this.
    pub(crate) least_seconds: u64,
    /// It is ended after this.
    pub(crate) most_seconds: u64,
    run: Run,
}

impl Item {
    fn new(
        section: &'static str,
        name: impl Into<String>,
        bar: &'static str,
        [least_seconds, most_seconds]: [u64; 2],
        run: impl Fn(&Setting) -> Result<Vec<String>> + 'static,
    ) -> Item {
        Item { section, name: name.into(), bar, least_seconds, most_seconds, run: Box::new(run) }
    }
}

/// All of them, in order.
pub(crate) struct Items(pub(crate) Vec<Item>);

impl Items {
    /// Answers one, in this process.
    pub(crate) fn run(&self, name: &str, setting: &Setting) -> Result<Vec<String>> {
        let item = self.0.iter().find(|item| item.name == name);
        (item.with_context(|| format!("there is no item {name}"))?.run)(setting)
    }
}

/// Checks that an emulator is through with in less than a second.
const QUICK: [&str; 4] = [
    "embed_and_gather_copy_rows",
    "no_rows_are_no_work",
    "rms_norm_divides_by_the_root_of_the_mean_square",
    "rope_turns_each_dimension_with_the_one_half_a_head_away",
];

pub(crate) fn all(setting: &Setting) -> Items {
    let mut items = vec![Item::new("Device", "ceilings", "none", [5, 60], ceilings)];
    for (name, check) in CHECKS.iter().filter(|(name, _)| !setting.is_small || QUICK.contains(name)) {
        let bar = "within the check's bound";
        items.push(Item::new("Battery", *name, bar, [2, 90], move |setting: &Setting| {
            check(setting.libraries.as_deref());
            Ok(vec!["right".to_owned()])
        }));
    }
    for (name, check) in collective::CHECKS {
        items.push(Item::new(
            "Collectives",
            name,
            "within the check's bound",
            [2, 60],
            move |setting: &Setting| collectives(check, setting),
        ));
    }
    let bar = "the bf16 bound of 0.08 of a deviation of the logits";
    items.push(Item::new("Logits", "Abacus against plain loops in f32", bar, [5, 60], logits::measure));
    let mut models = models::of(setting).into_iter().map(model);
    items.extend(models.next());
    for shape in products::shapes(setting) {
        let name = shape.to_string();
        let bar = "85 % of the best of cuBLASLt; aim 95 %";
        items.push(Item::new("Products", name, bar, [8, 60], move |setting: &Setting| {
            products::measure(shape, setting)
        }));
    }
    for case in attention::cases(setting) {
        let name = case.to_string();
        let bar = "split 75 % of the copy bandwidth; aim 90 %";
        items.push(Item::new("Attention", name, bar, [5, 40], move |setting: &Setting| {
            attention::measure(case, setting)
        }));
    }
    let blocks = models::for_steps(setting);
    items.push(Item::new("Steps", blocks.name, blocks.bar, blocks.seconds, move |setting: &Setting| {
        steps::measure(&blocks, setting)
    }));
    items.extend(models::for_bulk(setting).into_iter().map(|model| {
        Item::new("Jobs", model.name, model.bar, model.seconds, move |setting: &Setting| {
            bulk::measure(&model, setting)
        })
    }));
    items.extend(models);
    Items(items)
}

fn model(model: models::Measured) -> Item {
    Item::new("Models", model.name, model.bar, model.seconds, move |setting: &Setting| {
        models::measure(&model, setting)
    })
}

/// A check of NCCL with a rank of its own, and with two on the one GPU where NCCL lets them be there.
fn collectives(check: collective::Check, setting: &Setting) -> Result<Vec<String>> {
    let make = |num_ranks: usize, patience: Duration| {
        collective::on_gpus(setting.libraries.as_deref(), num_ranks, patience)
    };
    let (mut most, mut lines) = (0, Vec::new());
    for num_ranks in 1..=2 {
        match make(num_ranks, Duration::from_secs(20)) {
            Ok(_) => most = num_ranks,
            Err(error) => {
                lines.push(format!("no group of {num_ranks}: {error}"));
                break;
            }
        }
    }
    if most > 0 {
        let make = |num_ranks: usize, patience: Duration| make(num_ranks, patience).expect("it was there");
        check(&Groups { name: "nccl", make: &make, most });
        lines.push(format!("right, in groups of up to {most}"));
    }
    Ok(lines)
}

/// What was built, the GPU, the libraries that are there, and what it does at most.
fn ceilings(setting: &Setting) -> Result<Vec<String>> {
    let cuda = setting.cuda(WeightType::Bf16, KvDtype::Bf16, false)?;
    let (gpu, profile) = (cuda.gpu(), kernels::Backend::numeric_profile(&cuda));
    let library = match profile.contains("cublaslt") {
        true => profile.clone(),
        false => format!("{profile}; libcublasLt is missing: products are our own kernel's"),
    };
    Ok(vec![
        format!("commit {}", option_env!("SPANWISE_COMMIT").unwrap_or("not told")),
        format!(
            "{}, {} multiprocessors, {:.1} GB",
            gpu.name,
            gpu.multiprocessors,
            gpu.total_bytes as f64 / 1e9
        ),
        driver().unwrap_or_else(|| "driver: its version is not told".to_owned()),
        library,
        format!("copy {:.0} GB/s read and written", cuda.copy_bandwidth()? / 1e9),
        format!("bf16 products {:.1} TFLOP/s", cuda.product_flops()? / 1e12),
    ])
}

fn driver() -> Option<String> {
    let version = std::fs::read_to_string(Path::new("/proc/driver/nvidia/version")).ok()?;
    version.lines().next().map(str::to_owned)
}
