//! What the suite asks, the most important first.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use kernels::{Cuda, CudaOptions, KvDtype, WeightType};

use crate::battery::collective::{self, Groups};
use crate::battery::cuda::{CHECKS, CHECKS_OF_GPUS};
use crate::real_shapes::{self, Matrix};
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
pub(crate) const SECTIONS: [&str; 10] = [
    "Device",
    "Battery",
    "Real shapes",
    "Collectives",
    "Logits",
    "Models",
    "Jobs",
    "Products",
    "Attention",
    "Steps",
];

/// An item's lines of Markdown.
type Run = Box<dyn Fn(&Setting) -> Result<Vec<String>>>;

/// A question.
pub(crate) struct Item {
    pub(crate) section: &'static str,
    pub(crate) name: String,
    /// What it is to reach; it begins with `none` where nothing is held against it.
    pub(crate) bar: &'static str,
    /// Whether it asks what is right: its end without an error is the answer, while a figure's lines have a verdict.
    pub(crate) is_check: bool,
    /// It is not begun with less time than this.
    pub(crate) least_seconds: u64,
    /// It is ended after this.
    pub(crate) most_seconds: u64,
    run: Run,
}

impl Item {
    pub(crate) fn new(
        section: &'static str,
        name: impl Into<String>,
        bar: &'static str,
        [least_seconds, most_seconds]: [u64; 2],
        run: impl Fn(&Setting) -> Result<Vec<String>> + 'static,
    ) -> Item {
        let is_check = false;
        Item { section, name: name.into(), bar, is_check, least_seconds, most_seconds, run: Box::new(run) }
    }

    /// One that asks what is right.
    pub(crate) fn check(
        section: &'static str,
        name: impl Into<String>,
        bar: &'static str,
        seconds: [u64; 2],
        run: impl Fn(&Setting) -> Result<Vec<String>> + 'static,
    ) -> Item {
        Item { is_check: true, ..Item::new(section, name, bar, seconds, run) }
    }
}

/// Why an item has asked nothing.
#[derive(Debug)]
pub(crate) struct NothingAsked(String);

impl std::fmt::Display for NothingAsked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NothingAsked {}

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
const QUICK: [&str; 5] = [
    "a_step_is_captured_once_and_repeated",
    "embed_and_gather_copy_rows",
    "no_rows_are_no_work",
    "rms_norm_divides_by_the_root_of_the_mean_square",
    "rope_turns_each_dimension_with_the_one_half_a_head_away",
];

/// The bar of what compares.
const WITHIN: &str = "within the check's bound";

/// What is right comes first, then the bars, those that matter most before the others.
pub(crate) fn all(setting: &Setting) -> Items {
    let mut items = vec![Item::new("Device", "ceilings", "none", [5, 60], ceilings)];
    items.extend(checks(setting));
    let mut models = models::of(setting).into_iter().map(model);
    // The ten blocks of Ultra, and then all of it.
    items.extend(models.by_ref().take(2));
    items.extend(models::for_bulk(setting).into_iter().map(|model| {
        Item::new("Jobs", model.name, model.bar, model.seconds, move |setting: &Setting| {
            bulk::measure(&model, setting)
        })
    }));
    for shape in products::shapes(setting) {
        let bar = "85 % of the best of cuBLASLt; aim 95 %";
        items.push(Item::new("Products", shape.to_string(), bar, [8, 60], move |setting: &Setting| {
            products::measure(shape, setting)
        }));
    }
    for case in attention::cases(setting) {
        let bar = "split 75 % of the copy bandwidth; aim 90 %";
        items.push(Item::new("Attention", case.to_string(), bar, [5, 40], move |setting: &Setting| {
            attention::measure(case, setting)
        }));
    }
    let blocks = models::for_steps(setting);
    items.push(Item::new("Steps", blocks.name, blocks.bar, blocks.seconds, move |setting: &Setting| {
        steps::measure(&blocks, setting)
    }));
    items.extend(models);
    Items(items)
}

/// All that asks what is right.
fn checks(setting: &Setting) -> Vec<Item> {
    let mut items = Vec::new();
    let of_battery = CHECKS.iter().chain(CHECKS_OF_GPUS);
    for (name, check) in of_battery.filter(|(name, _)| !setting.is_small || QUICK.contains(name)) {
        items.push(Item::check("Battery", *name, WITHIN, [2, 90], move |setting: &Setting| {
            check(setting.libraries.as_deref());
            Ok(vec!["right".to_owned()])
        }));
    }
    let matrices: &[(&str, &'static [Matrix])] = match setting.is_small {
        true => &[("products with small matrices", &real_shapes::SMALL)],
        false => {
            &[("products with Ultra's", &real_shapes::ULTRA), ("products with Super's", &real_shapes::SUPER)]
        }
    };
    for &(name, matrices) in matrices {
        items.push(Item::check("Real shapes", name, WITHIN, [10, 120], move |setting: &Setting| {
            real_shapes::products(matrices, setting)
        }));
    }
    for heads in real_shapes::heads(setting) {
        let name = format!("attention in groups of {} at {} tokens", heads.group, heads.context);
        items.push(Item::check("Real shapes", name, WITHIN, [5, 90], move |setting: &Setting| {
            real_shapes::attention(heads, setting)
        }));
    }
    for (name, check) in collective::CHECKS {
        items.push(Item::check("Collectives", name, WITHIN, [2, 60], move |setting: &Setting| {
            collectives(&[check], 2, setting)
        }));
    }
    let alone = "a rank alone, which says nothing of several";
    items.push(Item::check("Collectives", alone, "none", [2, 60], |setting: &Setting| {
        collectives(&collective::CHECKS_OF_ONE, 1, setting)
    }));
    for (name, source) in logits::sources() {
        let bar = "the bf16 bound of 0.08 of a deviation of the logits";
        items.push(Item::check(
            "Logits",
            format!("{name} against plain loops in f32"),
            bar,
            [5, 60],
            move |setting: &Setting| logits::measure(source, setting),
        ));
    }
    items
}

fn model(model: models::Measured) -> Item {
    Item::new("Models", model.name, model.bar, model.seconds, move |setting: &Setting| {
        models::measure(&model, setting)
    })
}

/// Checks of NCCL with groups of up to so many ranks on the one GPU; nothing is asked where NCCL does not let as many be there.
fn collectives(checks: &[collective::Check], most: usize, setting: &Setting) -> Result<Vec<String>> {
    let make = |num_ranks: usize, patience: Duration| {
        collective::on_gpus(setting.libraries.as_deref(), num_ranks, patience)
    };
    if let Err(error) = make(most, Duration::from_secs(20)) {
        return Err(NothingAsked(format!("no group of {most}: {error}")).into());
    }
    let make = |num_ranks: usize, patience: Duration| make(num_ranks, patience).expect("it was there");
    checks.iter().for_each(|check| check(&Groups { name: "nccl", make: &make, most }));
    Ok(vec![format!("right, in groups of up to {most}")])
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
