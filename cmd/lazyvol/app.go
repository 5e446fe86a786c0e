package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
	"github.com/lazyvol/lazyvol/volume"
)

const (
	// Requests at once, of reads and of everything else. A read never waits
	// for background work to give up a slot.
	demandRequests     = 64
	backgroundRequests = 16

	// defaultReadAhead keeps a gigabyte a second flowing over a round trip of 50 ms.
	defaultReadAhead = 32 << 20

	// leafCacheBytes holds the leaves of 256 GiB of address space.
	leafCacheBytes = 32 << 20

	// commandPatience bounds how long a command other than a mount goes on
	// trying to reach a store.
	commandPatience = 30 * time.Second

	// defaultReadDeadline is how long a read of a mounted volume does.
	defaultReadDeadline = 60 * time.Second
)

// app is one invocation: where it talks to, and the global flags.
type app struct {
	stdin  io.Reader
	stdout io.Writer
	stderr io.Writer

	storeURL    string
	state       string
	owner       string // recorded in the snapshots that are made; "": none
	keys        *secretKeys
	verbose     bool
	memory      byteSize
	memoryGiven bool // it is not the default
	progress    progressMode
	operation   string // the command that runs, as "snapshot create"
	onEvent     string // command for events; "" is none
	events      emitter
	meter       *storeMeter
	logging     logFlags
	logged      logCounts
	logFile     *logFile               // of a daemon; nil: none
	settled     bool                   // the flags need no configuration
	origins     map[*pflag.Flag]origin // of flags that are not on the command line

	misconfigured error // what is wrong with the configuration file, which the doctor does without
}

func (a *app) command() *cobra.Command {
	root := &cobra.Command{
		Use:   "lazyvol",
		Short: "EBS-style snapshots for any Linux host",
		Long: `lazyvol keeps incremental snapshots of block devices in object storage, and
mounts them the moment they are asked for: what is missing is fetched when it is
read, and the rest follows in the background.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed,
2 usage, 3 not found, 4 refused by state (in use, pending, exists), 130 interrupted.`,
		Example: `  lazyvol snapshot create disk.img
  lazyvol mount snap-1a2b3c4d567890abc /mnt/old
  lazyvol unmount /mnt/old`,
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRunE: func(c *cobra.Command, _ []string) error {
			a.operation = commandPath(c)
			if slices.Contains(configless, a.operation) {
				return nil // nor do they need a state directory: who has no home has none
			}
			if err := a.goOnWithout(c, a.configure(c)); err != nil {
				return err
			}
			a.memoryGiven = c.Flags().Changed("memory")
			return errors.Join(a.boundMemory(), a.resolve())
		},
		Args: cobra.ArbitraryArgs, // for RunE to refuse: cobra's own refusal is no usage error
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return c.Help()
			}
			return unknownCommand(c, args[0])
		},
	}
	root.SetFlagErrorFunc(badFlag)
	flags := root.PersistentFlags()
	flags.StringVar(&a.storeURL, "store", "", "store `URL`: s3://bucket/prefix[?region=&endpoint=&profile=] or file:///path (LAZYVOL_STORE; default: the folder 'store' in the state directory)")
	flags.StringVar(&a.state, "state", "", "state `directory` (LAZYVOL_STATE; default: /var/lib/lazyvol for root, $XDG_STATE_HOME/lazyvol else)")
	flags.StringVar(&a.owner, "owner-id", "", "record `ID` as the owner of the snapshots that are made (LAZYVOL_OWNER; default: they are the store's, and its id is shown)")
	flags.Bool("json", false, "print errors, and what is listed or shown, as JSON")
	flags.Var(&a.memory, "memory", "need at most so many `bytes` of memory, in this process and in a daemon that it starts")
	a.progress = progressAuto
	flags.Var(&a.progress, "progress", "show on stderr `how` far a long command is: auto (a bar on a terminal), bar, json (a line at most each half second), none")
	flags.BoolVarP(&a.verbose, "verbose", "v", false, "log what is done to stderr: --log-level debug")
	a.logging.register(flags)
	flags.BoolVar(&a.settled, settledFlag, false, "")
	if err := flags.MarkHidden(settledFlag); err != nil {
		panic(err) // it is there
	}
	flags.String("config", "", "read settings from this `FILE` (LAZYVOL_CONFIG; default: /etc/lazyvol/config.toml for root, $XDG_CONFIG_HOME/lazyvol/config.toml else; '': none)")
	flags.StringVar(&a.onEvent, "on-event", "", "hand each event of this command, or of the daemon that it starts, to this shell `command`: EBS's JSON on stdin ("+onEventEnv+")")
	section(root, "keep", "Snapshots and volumes:", a.snapshotCommand(), a.volumeCommand())
	section(root, "use", "Using them:", a.mountCommand(), a.unmountCommand(), a.attachCommand(), a.detachCommand(), a.browseCommand(), a.hydrateCommand())
	section(root, "see", "Looking after them:", a.statusCommand(), a.healthCommand(), a.metricsCommand(), a.doctorCommand(), a.eventsCommand())
	section(root, "store", "The store, and keys:", a.initCommand(), a.gcCommand(), a.policyCommand(), a.keyCommand())
	section(root, "tool", "The tool:", a.configCommand(), a.completionCommand(), a.manCommand(), a.versionCommand())
	root.SetHelpCommandGroupID("tool")
	root.InitDefaultHelpCmd()
	if help, _, err := root.Find([]string{"help"}); err == nil {
		help.Args = helpTopic
	}
	root.AddCommand(a.probeMountCommand()) // hidden
	a.complete(root)
	return root
}

// section adds commands to root, under a title of its help.
func section(root *cobra.Command, id, title string, commands ...*cobra.Command) {
	root.AddGroup(&cobra.Group{ID: id, Title: title})
	for _, c := range commands {
		c.GroupID = id
	}
	root.AddCommand(commands...)
}

// args makes a check of the number of arguments a usage error.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if err := check(c, args); err != nil {
			return usageError{fmt.Errorf("%w: usage: %s", err, c.UseLine())}
		}
		return nil
	}
}

// group is a command that only has subcommands.
func group(use, short string, commands ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, RunE: func(c *cobra.Command, args []string) error {
		if len(args) == 0 {
			return usageError{fmt.Errorf("'%s' needs a command; see '%s --help'", c.CommandPath(), c.CommandPath())}
		}
		return unknownCommand(c, args[0])
	}}
	c.AddCommand(commands...)
	for _, sub := range commands { // the first of each
		example, _, _ := strings.Cut(sub.Example, "\n")
		c.Example += example + "\n"
	}
	c.Example = strings.TrimSuffix(c.Example, "\n")
	return c
}

// resolve fills in what the flags left open.
func (a *app) resolve() error {
	if a.owner != "" {
		if err := manifest.CheckOwner(a.owner); err != nil {
			return usageError{fmt.Errorf("--owner-id: %w", err)}
		}
	}
	if a.state == "" {
		a.state = "/var/lib/lazyvol"
		if os.Geteuid() != 0 {
			home := os.Getenv("XDG_STATE_HOME")
			if home == "" {
				user, err := os.UserHomeDir()
				if err != nil {
					return fmt.Errorf("find a state directory: %w (use --state)", err)
				}
				home = filepath.Join(user, ".local", "state")
			}
			a.state = filepath.Join(home, "lazyvol")
		}
	}
	state, err := filepath.Abs(a.state)
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	a.state = state
	return nil
}

// defaultStore is the store inside the state directory.
func (a *app) defaultStore() string {
	return (&url.URL{Scheme: "file", Path: filepath.Join(a.state, "store")}).String()
}

// log returns the logger of a command: to stderr, and quiet unless asked.
func (a *app) log() *slog.Logger { return a.logger(a.stderr, a.minimum(slog.LevelWarn)) }

// A remote is the store of an invocation.
type remote struct {
	*snapshot.Store                  // tries again
	objects         blockstore.Store // does not
}

// openStore is openRemote for commands that only follow the protocol.
func (a *app) openStore(ctx context.Context, at string, patience time.Duration) (*snapshot.Store, error) {
	r, err := a.openRemote(ctx, at, patience)
	return r.Store, err
}

// openRemote opens the store of this invocation, or at, where a volume knows
// its own. The default store is made on first use. Requests are tried again for
// as long as patience.
func (a *app) openRemote(ctx context.Context, at string, patience time.Duration) (remote, error) {
	return a.connect(ctx, cmp.Or(a.storeURL, at, a.defaultStore()), patience)
}

// connect is openRemote for a store that is named.
func (a *app) connect(ctx context.Context, at string, patience time.Duration) (remote, error) {
	isDefault := at == a.defaultStore()
	open := blockstore.Open
	if isDefault {
		open = blockstore.Create
	}
	objects, err := open(ctx, at)
	if err != nil {
		return remote{}, openError(err)
	}
	objects = blockstore.Observe(objects, a.meter.seen)
	retrying := blockstore.Retry(objects, blockstore.RetryPolicy{Total: patience, Retried: a.meter.retried})
	if isDefault {
		store, err := snapshot.Init(ctx, retrying)
		if err == nil {
			store.SetOwner(a.owner)
			store.UseKeys(a.keys)
		}
		return remote{store, objects}, err
	}
	store := snapshot.New(retrying)
	store.SetOwner(a.owner)
	store.UseKeys(a.keys)
	store.CacheRecords(cache.Records{FS: vfs.OS(), Folder: filepath.Join(a.state, "records"), Log: a.log()})
	return remote{store, objects}, nil
}

// openError makes a store URL that cannot be understood a usage error; missing
// credentials and the like are none.
func openError(err error) error {
	if path := (*fs.PathError)(nil); errors.As(err, &path) || errors.Is(err, blockstore.ErrDenied) {
		return err
	}
	return usageError{err}
}

// host wires the devices of this process to their store. Clean bytes leave a tenth of
// the filesystem free.
func (a *app) host(store remote, deadline time.Duration, log *slog.Logger) (*volume.Host, error) {
	if err := os.MkdirAll(a.state, 0o700); err != nil {
		return nil, fmt.Errorf("make the state directory: %w", err)
	}
	boot, err := volume.BootID()
	if err != nil {
		return nil, err
	}
	leaves, err := cache.NewLeaves(a.leafCache())
	if err != nil {
		return nil, err
	}
	// Limits lie below the retries: a request that waits to try again holds up no other.
	limited := func(requests int) blockstore.Store {
		return blockstore.Retry(blockstore.Limit(store.objects, requests), blockstore.RetryPolicy{Total: deadline, Retried: a.meter.retried})
	}
	return &volume.Host{
		FS: vfs.OS(), State: a.state, Store: store.Store, Name: hostname(), Boot: boot, Leaves: leaves,
		Demand: limited(demandRequests), Background: limited(backgroundRequests),
		ReadDeadline: deadline, Log: log, Budget: volume.NewBudget(vfs.OS(), a.state, 0, log),
		UploadMemory: a.heap(),
	}, nil
}

// hostname names this host in pins, for people.
func hostname() string {
	name, err := os.Hostname()
	if err != nil {
		return "unknown"
	}
	return name
}

func (a *app) initCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "init",
		Short: "Make the store, and prove that it honours conditional puts",
		Long: `Makes the store unless it is there, after proving with a few small objects that
it honours If-None-Match and If-Match: what keeps hosts from losing each other's
snapshots. Safe to run again, and from several hosts.`,
		Example: "  lazyvol --store s3://my-bucket/disks init",
		Args:    args(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			ctx := c.Context()
			objects, err := blockstore.Create(ctx, cmp.Or(a.storeURL, a.defaultStore()))
			if err != nil {
				return openError(err)
			}
			a.warnVersioned(ctx, objects)
			objects = blockstore.Retry(objects, blockstore.RetryPolicy{Total: commandPatience})
			if err := blockstore.Probe(ctx, objects); err != nil {
				return fmt.Errorf("init: %w", err)
			}
			store, err := snapshot.Init(ctx, objects)
			if err != nil {
				return fmt.Errorf("init: %w", err)
			}
			id, err := store.ID(ctx)
			if err != nil {
				return fmt.Errorf("init: %w", err)
			}
			fmt.Fprintf(a.stderr, "store %s is ready, id %s\n", store, id)
			return nil
		},
	}
}

// parseSnapshot parses an id given on the command line.
func parseSnapshot(s string) (manifest.SnapshotID, error) {
	id, err := manifest.ParseSnapshotID(s)
	if err != nil {
		return id, usageError{err}
	}
	return id, nil
}

// parseSnapshots parses several.
func parseSnapshots(args []string) ([]manifest.SnapshotID, error) {
	ids := make([]manifest.SnapshotID, len(args))
	for i, arg := range args {
		id, err := parseSnapshot(arg)
		if err != nil {
			return nil, err
		}
		ids[i] = id
	}
	return ids, nil
}
