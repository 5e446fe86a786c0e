package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

func (a *app) policyCommand() *cobra.Command {
	return group("policy", "What holds for all snapshots of the store", a.policyShowCommand(), a.policySetCommand())
}

// policyJSON is the policy with EBS's names where it has some.
type policyJSON struct {
	RetentionRules []retentionRuleJSON
	State          string // of block public access
}

type retentionRuleJSON struct {
	ResourceTagKey       string `json:",omitempty"` // none: all snapshots
	ResourceTagValue     string `json:",omitempty"` // none: any value
	RetentionPeriodInSec int64
}

func (a *app) policyShowCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "show", Short: "Show the store's policy", Args: args(cobra.NoArgs),
		Example: "  lazyvol policy show",
		RunE: func(c *cobra.Command, _ []string) error {
			store, err := a.openStore(c.Context(), "", commandPatience)
			if err != nil {
				return err
			}
			if _, err := store.ID(c.Context()); err != nil {
				return err
			}
			policy, err := store.Policy(c.Context())
			if err != nil {
				return err
			}
			return a.printPolicy(policy, asJSON)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func (a *app) printPolicy(policy manifest.Policy, asJSON bool) error {
	if asJSON {
		j := policyJSON{RetentionRules: []retentionRuleJSON{}, State: policy.Public()}
		for _, r := range policy.Retain {
			j.RetentionRules = append(j.RetentionRules, retentionRuleJSON{r.Tag, r.Value, r.Seconds})
		}
		return printJSON(a.stdout, j)
	}
	w := tabwriter.NewWriter(a.stdout, 0, 4, 2, ' ', 0)
	for _, r := range policy.Retain {
		what := "all"
		if r.Tag != "" {
			what = r.Tag + "=" + cmp.Or(r.Value, "*")
		}
		fmt.Fprintf(w, "retain deleted:\t%s\t%s\n", oneLine(what), formatRetention(time.Duration(r.Seconds)*time.Second))
	}
	if len(policy.Retain) == 0 {
		fmt.Fprintf(w, "retain deleted:\tnone\n")
	}
	fmt.Fprintf(w, "public access:\t%s\n", policy.Public())
	return w.Flush()
}

func (a *app) policySetCommand() *cobra.Command {
	var rules []string
	var public string
	c := &cobra.Command{
		Use: "set [--retain [KEY[=VALUE]:]TIME]... [--public-access STATE]", Short: "Change the store's policy", Args: args(cobra.NoArgs),
		Long: `Changes the store's policy. What is not named stays as it is.

--retain keeps deleted snapshots in the recycle bin: all of them, or those with a tag.
TIME is as 7d or 12h, 365 days at most, or none, which takes the rule away. Of several
rules that fit a snapshot the longest counts. A change does not concern what is in the
bin already.

--public-access is EBS's block public access: block-all-sharing (snapshots shared with
all count as not shared, and keep their attribute), block-new-sharing (no more can be
shared with all) or unblocked.

The policy is kept by lazyvol's own commands, of this version or a later one.`,
		Example: `  lazyvol policy set --retain 7d --retain env=prod:30d
  lazyvol policy set --public-access block-all-sharing`,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx := c.Context()
			if len(rules) == 0 && public == "" {
				return usageError{errors.New("nothing to do: give --retain or --public-access")}
			}
			var parsed []manifest.RetainRule
			for _, text := range rules {
				r, err := parseRule(text)
				if err != nil {
					return err
				}
				parsed = append(parsed, r)
			}
			states := []string{"", manifest.PublicUnblocked, manifest.PublicBlockNew, manifest.PublicBlockAll}
			if !slices.Contains(states, public) {
				return usageError{fmt.Errorf("--public-access %q is none of %s", public, strings.Join(states[1:], ", "))}
			}
			store, err := a.openStore(ctx, "", commandPatience)
			if err != nil {
				return err
			}
			if _, err := store.ID(ctx); err != nil {
				return err
			}
			_, err = store.ChangePolicy(ctx, func(policy *manifest.Policy) error {
				for _, r := range parsed {
					setRule(policy, r)
				}
				policy.PublicAccess = cmp.Or(public, policy.PublicAccess)
				return nil
			})
			return err
		},
	}
	c.Flags().StringArrayVar(&rules, "retain", nil, "keep deleted snapshots for a `TIME`, or those with a tag: KEY=VALUE:TIME (repeatable)")
	c.Flags().StringVar(&public, "public-access", "", "`STATE` of sharing with all: unblocked, block-new-sharing or block-all-sharing")
	return c
}

// parseRule parses a rule as --retain has it. One that is to go has no time.
func parseRule(text string) (manifest.RetainRule, error) {
	var r manifest.RetainRule
	period := text
	if i := strings.LastIndexByte(text, ':'); i >= 0 {
		r.Tag, r.Value, _ = strings.Cut(text[:i], "=")
		period = text[i+1:]
		if r.Tag == "" {
			return r, usageError{fmt.Errorf("--retain %q names no tag before the colon", text)}
		}
	}
	if period == "none" {
		return r, nil
	}
	d, err := parseRetention(period)
	if err == nil && d == 0 {
		err = errors.New("give none to take a rule away")
	}
	if err != nil {
		return r, usageError{fmt.Errorf("--retain: %w", err)}
	}
	r.Seconds = int64(d / time.Second)
	return r, nil
}

// setRule puts a rule in the place of one for the same snapshots.
func setRule(policy *manifest.Policy, rule manifest.RetainRule) {
	policy.Retain = slices.DeleteFunc(policy.Retain, func(r manifest.RetainRule) bool { return r.Tag == rule.Tag && r.Value == rule.Value })
	if rule.Seconds > 0 {
		policy.Retain = append(policy.Retain, rule)
	}
}

// warnVersioned tells of a bucket that keeps what is deleted. That it may not be
// asked is no reason to fail.
func (a *app) warnVersioned(ctx context.Context, objects blockstore.Store) {
	versioned, err := blockstore.Versioned(ctx, objects)
	switch {
	case err != nil:
		a.log().Debug("could not find out whether the bucket is versioned", "error", err)
	case versioned:
		a.warning("the bucket of %s is versioned: what is deleted or replaced frees nothing until its old versions expire (give it a lifecycle rule for noncurrent versions)", objects)
	}
}
