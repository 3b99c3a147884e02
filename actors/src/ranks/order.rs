//! What a process is told of the part of a model that it shall hold, whether it is a stage or one of a stage's ranks.

use std::path::Path;
use std::time::Duration;

use scheduler::Span;
use serde_json::{Value, json};
use stages::{Dtypes, Exceptions, KvDtype, Model, Part, Sharing, SpanOptions, StepSize, WeightType};

use super::RanksArgs;
use crate::error::with_causes;
use crate::wire;

/// A stage's part of a model, and how those who hold it deal with each other.
#[derive(Debug, Clone)]
pub(crate) struct SpanOrder {
    pub(crate) stage: usize,
    /// Tells the connections of this life from those of others.
    pub(crate) group: u64,
    pub(crate) patience: Duration,
    /// The model's folder.
    pub(crate) model: String,
    pub(crate) random_weights: bool,
    /// The model's identity: its folder may have changed.
    pub(crate) identity: String,
    pub(crate) dtypes: Dtypes,
    pub(crate) options: SpanOptions,
    pub(crate) sharing: Sharing,
    /// The plan of faults, where there is one.
    pub(crate) faults: Option<String>,
}

impl SpanOrder {
    pub(crate) fn of(args: &RanksArgs, group: u64) -> Self {
        SpanOrder {
            stage: args.stage,
            group,
            patience: args.patience,
            model: args.model.directory.display().to_string(),
            random_weights: args.model.weights.is_random(),
            identity: args.model.identity.clone(),
            dtypes: args.dtypes,
            options: args.options,
            sharing: args.sharing.clone(),
            faults: jobs::faults::plan(),
        }
    }

    pub(crate) fn json(&self) -> Value {
        let SpanOptions { part, num_pages, context_tokens, largest_step } = self.options;
        let largest_step = largest_step
            .map(|step| [step.rows, step.sequences, step.context_tokens, step.micro_batches, step.arrivals]);
        json!({
            "stage": self.stage, "group": self.group, "patience_ms": self.patience.as_millis() as u64,
            "model": self.model, "random_weights": self.random_weights, "identity": self.identity,
            "weights": self.dtypes.weights.name(), "kv": self.dtypes.kv.name(),
            "blocks": [part.blocks.start, part.blocks.end], "first_column": part.first_column,
            "end_column": part.end_column, "num_pages": num_pages, "context_tokens": context_tokens,
            "largest_step": largest_step,
            "sharing": self.sharing.exceptions(), "faults": self.faults,
        })
    }

    /// The order that such JSON means.
    pub(crate) fn read(order: &Value) -> Option<Self> {
        let number = |key: &str| order[key].as_u64();
        let size = |key: &str| usize::try_from(number(key)?).ok();
        let text = |key: &str| order[key].as_str().map(str::to_owned);
        let weights =
            WeightType::ALL.into_iter().find(|weights| Some(weights.name()) == order["weights"].as_str());
        let kv = KvDtype::ALL.into_iter().find(|kv| Some(kv.name()) == order["kv"].as_str());
        let [start, end] = wire::list(&order["blocks"])?[..] else { return None };
        let end_column = match &order["end_column"] {
            Value::Null => None,
            column => Some(usize::try_from(column.as_u64()?).ok()?),
        };
        let part = Part { blocks: Span { start, end }, first_column: size("first_column")?, end_column };
        let largest_step = match &order["largest_step"] {
            Value::Null => None,
            step => {
                let [rows, sequences, context_tokens, micro_batches, arrivals] = wire::list(step)?[..] else {
                    return None;
                };
                Some(StepSize { rows, sequences, context_tokens, micro_batches, arrivals })
            }
        };
        Some(SpanOrder {
            stage: size("stage")?,
            group: number("group")?,
            patience: Duration::from_millis(number("patience_ms")?),
            model: text("model")?,
            random_weights: order["random_weights"].as_bool()?,
            identity: text("identity")?,
            dtypes: Dtypes { weights: weights?, kv: kv? },
            options: SpanOptions {
                part,
                num_pages: size("num_pages")?,
                context_tokens: size("context_tokens")?,
                largest_step,
            },
            sharing: serde_json::from_value::<Exceptions>(order["sharing"].clone()).ok()?.into(),
            faults: text("faults"),
        })
    }

    /// Has the faults happen in this process that were planned for all.
    ///
    /// # Errors
    /// A plan that is none.
    pub(crate) fn install_faults(&self) -> Result<(), String> {
        if let Some(plan) = &self.faults {
            plan.parse::<jobs::faults::Faults>()?.install();
        }
        Ok(())
    }

    /// The model as this process finds it.
    ///
    /// # Errors
    /// One that cannot be read, or is another than whoever gave the order has.
    pub(crate) fn open_model(&self) -> Result<Model, String> {
        let (model, _) =
            Model::open(Path::new(&self.model), self.random_weights).map_err(|e| with_causes(&e))?;
        if model.identity != self.identity {
            return Err(format!("{}: the model has changed", self.model));
        }
        Ok(model)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// One whose every part is another than that of its neighbours.
    pub(crate) fn order(end_column: Option<usize>) -> SpanOrder {
        SpanOrder {
            stage: 3,
            group: u64::MAX - 7,
            patience: Duration::from_millis(2500),
            model: "some/where \"else\"".to_owned(),
            random_weights: true,
            identity: "abc".to_owned(),
            dtypes: Dtypes { weights: WeightType::Int8, kv: KvDtype::Bf16 },
            options: SpanOptions {
                part: Part { blocks: Span { start: 4, end: 7 }, first_column: 640, end_column },
                num_pages: 99,
                context_tokens: 1 << 17,
                largest_step: end_column.map(|_| StepSize {
                    rows: 5,
                    sequences: 6,
                    context_tokens: 7,
                    micro_batches: 8,
                    arrivals: 9,
                }),
            },
            sharing: Sharing::from(Exceptions {
                attention_by_sequences: vec![4, 6],
                attention_on_first_rank: vec![5],
                ffn_on_first_rank: vec![6],
            }),
            faults: Some("stage3@3:kill".to_owned()),
        }
    }

    #[test]
    fn orders_come_back_as_they_were_given() {
        let plain = SpanOrder { random_weights: false, faults: None, ..order(None) };
        for order in [order(Some(1280)), plain] {
            let back = SpanOrder::read(&order.json()).expect("an order");
            assert_eq!(format!("{back:?}"), format!("{order:?}"));
        }
        assert!(SpanOrder::read(&json!({})).is_none());
    }
}
