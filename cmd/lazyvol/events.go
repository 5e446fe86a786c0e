package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/snapshot"
)

// eventsPoll is the pause between two looks of 'events --follow': one listing
// each, of the last half hour's keys.
const eventsPoll = 2 * time.Second

func (a *app) eventsCommand() *cobra.Command {
	var follow, asJSON bool
	var since string
	c := &cobra.Command{
		Use: "events", Short: "Show what happened in the store", Args: args(cobra.NoArgs),
		Long: `Shows what happened in the store on all hosts, oldest first: createSnapshot,
copySnapshot, deleteSnapshot, shareSnapshot, createSnapshots (of several volumes at
once), createVolume and initializeVolume, succeeded or failed, and why. With --json
as EBS tells of it on EventBridge, one event a line. Events are kept for 90 days, and
'lazyvol gc' removes older ones.

With --follow only what happens from now on, unless --since says otherwise, until it
is interrupted. The times are those of the hosts' clocks: one that is behind shows up
late, and not out of sight, if it is by less than half an hour.

To be told at once, give --on-event (or LAZYVOL_ON_EVENT) to the commands that work.`,
		Example: `  lazyvol events --since 24h
  lazyvol events --follow --json
  LAZYVOL_ON_EVENT='jq -r .detail.cause | mail -s lazyvol root' lazyvol snapshot create vol-0123456789abcdef0`,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx := c.Context()
			from, err := parseSince(since, time.Now())
			if err != nil {
				return err
			}
			store, err := a.openStore(ctx, "", commandPatience)
			if err != nil {
				return err
			}
			if _, err := store.ID(ctx); err != nil {
				return err
			}
			show := printEvent
			if asJSON {
				show = printEventJSON
			}
			var damaged []error
			handle := func(e snapshot.Event, bad error) error {
				if bad == nil {
					return show(a.stdout, e)
				}
				if follow {
					a.log().Warn("an event cannot be read", "error", bad)
				} else if damaged = append(damaged, bad); len(damaged) == maxDamagedEvents {
					return errors.New("too many events cannot be read")
				}
				return nil
			}
			if !follow {
				err := store.Events(ctx, from, handle)
				return errors.Join(append(damaged, err)...)
			}
			return a.followEvents(ctx, store, from, handle)
		},
	}
	flags := c.Flags()
	flags.BoolVarP(&follow, "follow", "f", false, "go on as things happen")
	flags.BoolVar(&asJSON, "json", false, "print EBS's JSON, one event a line")
	flags.StringVar(&since, "since", "", "show those from this `time` on: 2h, 7d, 2026-11-22, 2026-11-22T13:14:15Z (default: all, and with --follow new ones)")
	return c
}

// maxDamagedEvents bounds how many events that cannot be read are named.
const maxDamagedEvents = 100

// parseSince returns the time that people mean: so long before now, or that time.
// It is zero for "".
func parseSince(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if days, ok := strings.CutSuffix(s, "d"); ok {
		if n, err := strconv.ParseUint(days, 10, 16); err == nil {
			return now.AddDate(0, 0, -int(n)), nil
		}
	}
	if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	for _, layout := range []string{time.RFC3339, time.DateTime, "2006-01-02T15:04:05", time.DateOnly} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil && t.UTC().Year() >= 0 && t.UTC().Year() <= 9999 {
			return t, nil
		}
	}
	return time.Time{}, usageError{fmt.Errorf("--since %q is neither a duration like 2h or 7d nor a time like 2026-11-22T13:14:15Z", s)}
}

// followEvents shows events until ctx ends. A store that does not answer for a
// while makes them late.
func (a *app) followEvents(ctx context.Context, store *snapshot.Store, from time.Time, handle snapshot.HandleEvent) error {
	follower := store.FollowEvents(from)
	if from.IsZero() {
		var err error
		if follower, err = store.FollowNewEvents(ctx); err != nil {
			return err
		}
	}
	for {
		err := follower.Poll(ctx, handle)
		if errors.Is(err, blockstore.ErrUnavailable) && ctx.Err() == nil {
			a.log().Warn("the store does not answer; trying again", "error", err)
			err = nil
		}
		if err != nil && ctx.Err() == nil {
			return err
		}
		select {
		case <-ctx.Done(): // that is how it ends: no error worth a word
			return fmt.Errorf("%w: %w", errReported, context.Cause(ctx))
		case <-time.After(eventsPoll):
		}
	}
}

func printEventJSON(w io.Writer, e snapshot.Event) error {
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	return encoder.Encode(e)
}

// printEvent prints an event as one line: when, what, of what, and why it failed.
func printEvent(w io.Writer, e snapshot.Event) error {
	var of []string
	for _, resource := range e.Resources {
		of = append(of, named(resource))
	}
	line := fmt.Sprintf("%s  %-16s  %-9s  %s", e.Time.Local().Format(time.DateTime), e.Detail.Event, e.Detail.Result, orDash(strings.Join(of, " ")))
	if e.Detail.Source != "" {
		line += "  from " + named(e.Detail.Source)
	}
	if e.Detail.Cause != "" {
		line += "  " + e.Detail.Cause
	}
	_, err := fmt.Fprintln(w, oneLine(line))
	return err
}

// named returns the id in an ARN.
func named(arn string) string { return arn[strings.LastIndexByte(arn, '/')+1:] }
