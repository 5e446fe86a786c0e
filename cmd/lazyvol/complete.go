package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/fs"
	"github.com/lazyvol/lazyvol/internal/loopdev"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/snapshot"
	"github.com/lazyvol/lazyvol/volume"
)

// completionPatience bounds how long a shell waits for the store when it completes
// a word: then there is nothing to choose from.
const completionPatience = 2 * time.Second

// A lister lists what a word of the command line may be. It fails silently: the
// person is in the middle of typing.
type lister func(a *app, ctx context.Context, word string) []cobra.Completion

// An argument is what one place of a command line takes.
type argument struct {
	listers   []lister
	directive cobra.ShellCompDirective // for the shell, beside what is listed
}

func oneOf(listers ...lister) argument {
	return argument{listers, cobra.ShellCompDirectiveNoFileComp}
}

// choice is one of a few words.
func choice(words ...cobra.Completion) argument {
	return oneOf(func(*app, context.Context, string) []cobra.Completion { return words })
}

func file(or ...lister) argument { return argument{or, cobra.ShellCompDirectiveDefault} }

func directory() argument { return argument{nil, cobra.ShellCompDirectiveFilterDirs} }

// places are the arguments of a command, in order.
type places struct {
	arguments []argument
	repeated  bool // the last one takes any number
}

// completedArguments says what the arguments of each command are. Those that are not named
// here complete to nothing.
var completedArguments = map[string]places{
	"snapshot create":          {[]argument{file((*app).volumeIDs)}, true},
	"snapshot show":            {[]argument{oneOf((*app).snapshotIDs)}, false},
	"snapshot diff":            {[]argument{oneOf((*app).snapshotIDs), oneOf((*app).snapshotIDs)}, false},
	"snapshot map":             {[]argument{oneOf((*app).volumeIDs, (*app).snapshotIDs)}, false},
	"snapshot tag":             {[]argument{oneOf((*app).snapshotIDs)}, false},
	"snapshot export":          {[]argument{oneOf((*app).snapshotIDs), file()}, false},
	"snapshot verify":          {[]argument{oneOf((*app).snapshotIDs)}, false},
	"snapshot copy":            {[]argument{oneOf((*app).snapshotIDs)}, false},
	"snapshot delete":          {[]argument{oneOf((*app).snapshotIDs)}, true},
	"snapshot lock":            {[]argument{oneOf((*app).snapshotIDs)}, false},
	"snapshot unlock":          {[]argument{oneOf((*app).snapshotIDs)}, false},
	"snapshot restore-deleted": {[]argument{oneOf((*app).binnedIDs)}, true},
	"snapshot share":           {[]argument{oneOf((*app).snapshotIDs)}, false},
	"volume show":              {[]argument{oneOf((*app).volumeIDs)}, false},
	"volume resize":            {[]argument{oneOf((*app).volumeIDs)}, false},
	"volume delete":            {[]argument{oneOf((*app).volumeIDs)}, false},
	"mount":                    {[]argument{oneOf((*app).volumeIDs, (*app).snapshotIDs), directory()}, false},
	"browse":                   {[]argument{directory()}, false},
	"unmount":                  {[]argument{oneOf((*app).mountDirs, (*app).volumeIDs)}, false},
	"attach":                   {[]argument{oneOf((*app).volumeIDs, (*app).snapshotIDs)}, false},
	"detach":                   {[]argument{oneOf((*app).loopDevices, (*app).attachedIDs, (*app).attachedDirs)}, false},
	"status":                   {[]argument{oneOf((*app).volumeIDs, (*app).mountDirs)}, false},
	"health":                   {[]argument{oneOf((*app).volumeIDs, (*app).mountDirs)}, false},
	"hydrate":                  {[]argument{oneOf((*app).volumeIDs, (*app).mountDirs)}, false},
	"key generate":             {[]argument{file()}, false},
	"key shred":                {[]argument{oneOf((*app).snapshotIDs)}, false},
	"config check":             {[]argument{file()}, false},
	"man":                      {[]argument{directory()}, false},
	"completion":               {[]argument{choice("bash", "fish", "zsh")}, false},
}

// completedFlags says the same of flags, on whichever command.
var completedFlags = map[string]argument{
	"state":         directory(),
	"config":        file(),
	"output":        file(),
	"log-level":     choice("debug", "info", "warn", "error"),
	"log-format":    choice("text", "json"),
	"freeze":        directory(),
	"mount":         directory(),
	"parent":        oneOf((*app).snapshotIDs),
	"snapshot":      oneOf((*app).snapshotIDs),
	"progress":      choice("auto", "bar", "json", "none"),
	"mode":          choice("governance", "compliance"),
	"public-access": choice("unblocked", "block-new-sharing", "block-all-sharing"),
}

// complete makes the arguments and flags of the commands under root complete.
func (a *app) complete(root *cobra.Command) {
	root.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveNoFileComp)
	err := eachCommand(root, func(c *cobra.Command) error {
		if p, ok := completedArguments[commandPath(c)]; ok {
			c.ValidArgsFunction = a.completer(p)
		}
		for name, arg := range completedFlags {
			if c.LocalNonPersistentFlags().Lookup(name) == nil && c.PersistentFlags().Lookup(name) == nil {
				continue
			}
			err := c.RegisterFlagCompletionFunc(name, func(c *cobra.Command, _ []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
				return a.candidates(c, arg, nil, word), arg.directive
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		panic(err) // a flag registered twice: the tables are wrong
	}
}

// eachCommand calls fn for c and for all that is below it and listed in its help.
func eachCommand(c *cobra.Command, fn func(*cobra.Command) error) error {
	if err := fn(c); err != nil {
		return err
	}
	for _, sub := range c.Commands() {
		if !sub.IsAvailableCommand() {
			continue
		}
		if err := eachCommand(sub, fn); err != nil {
			return err
		}
	}
	return nil
}

func (a *app) completer(p places) cobra.CompletionFunc {
	return func(c *cobra.Command, given []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
		at := len(given)
		if p.repeated {
			at = min(at, len(p.arguments)-1)
		}
		if at >= len(p.arguments) {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		arg := p.arguments[at]
		return a.candidates(c, arg, given, word), arg.directive
	}
}

// candidates lists what a word may become, but for what was given before it.
func (a *app) candidates(c *cobra.Command, arg argument, given []string, word string) []cobra.Completion {
	if a.configure(c) != nil || a.resolve() != nil { // again: the flags of the line are known only now
		return nil
	}
	ctx := c.Context()
	var found []cobra.Completion
	for _, list := range arg.listers {
		found = append(found, list(a, ctx, word)...)
	}
	return slices.DeleteFunc(found, func(c cobra.Completion) bool {
		id, _, _ := strings.Cut(c, "\t")
		return !strings.HasPrefix(id, word) || slices.Contains(given, id)
	})
}

// mayBecome reports whether a word that is being typed may become an id of a kind.
func mayBecome(word, kind string) bool {
	return strings.HasPrefix(word, kind) || strings.HasPrefix(kind, word)
}

// volumeIDs lists the volumes of this host.
func (a *app) volumeIDs(_ context.Context, _ string) (ids []cobra.Completion) {
	records, _, err := volume.List(vfs.OS(), a.state)
	if err != nil {
		return nil
	}
	for _, r := range records {
		ids = append(ids, described(string(r.ID), size(r.Size)))
	}
	return ids
}

func (a *app) mountDirs(context.Context, string) []cobra.Completion {
	dirs, err := fs.Mounted()
	if err != nil {
		return nil
	}
	return dirs
}

// loopDevices lists the loop devices on our mounts.
func (a *app) loopDevices(context.Context, string) (devs []cobra.Completion) {
	dirs, err := fs.Mounted()
	if err != nil {
		return nil
	}
	attached, err := loopdev.Attached()
	if err != nil {
		return nil
	}
	for _, dev := range attached {
		image, err := loopdev.Backing(dev)
		if err == nil && slices.Contains(dirs, filepath.Dir(image)) {
			devs = append(devs, dev)
		}
	}
	return devs
}

// attachedIDs lists what attach mounted.
func (a *app) attachedIDs(context.Context, string) (ids []cobra.Completion) {
	entries, err := os.ReadDir(a.attachDir(""))
	if err != nil {
		return nil
	}
	for _, e := range entries {
		if e.IsDir() { // what else there is are records
			ids = append(ids, e.Name())
		}
	}
	return ids
}

// snapshotIDs lists the snapshots of the store.
func (a *app) snapshotIDs(ctx context.Context, word string) []cobra.Completion {
	return a.listedIDs(ctx, word, func(ctx context.Context, s *snapshot.Store) ([]snapshot.Description, error) {
		return s.List(ctx, false)
	})
}

// binnedIDs lists the snapshots in the recycle bin.
func (a *app) binnedIDs(ctx context.Context, word string) []cobra.Completion {
	return a.listedIDs(ctx, word, func(ctx context.Context, s *snapshot.Store) ([]snapshot.Description, error) {
		return s.ListBin(ctx)
	})
}

// listedIDs asks the store for snapshots, for as long as completionPatience; records that
// this host has are not asked for. Unlike a command, it makes no store.
func (a *app) listedIDs(ctx context.Context, word string, list func(context.Context, *snapshot.Store) ([]snapshot.Description, error)) (ids []cobra.Completion) {
	if !mayBecome(word, "snap-") {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, completionPatience)
	defer cancel()
	objects, err := blockstore.Open(ctx, cmp.Or(a.storeURL, a.defaultStore()))
	if err != nil {
		return nil
	}
	store := snapshot.New(blockstore.Retry(objects, blockstore.RetryPolicy{Total: completionPatience}))
	store.CacheRecords(cache.Records{FS: vfs.OS(), Folder: filepath.Join(a.state, "records"), Log: a.log()})
	found, _ := list(ctx, store) // beside an error are those that are whole
	for _, d := range slices.Backward(found) {
		ids = append(ids, described(d.ID.String(), fmt.Sprintf("%s %s %s", d.Start.Local().Format(time.DateTime), size(d.Geometry.Size), d.Description)))
	}
	return ids
}

// described is a word with what the shell shows beside it.
func described(word, text string) cobra.Completion {
	return cobra.CompletionWithDesc(word, strings.TrimSpace(oneLine(text)))
}

func (a *app) completionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "completion bash|zsh|fish", Short: "Print a script that completes commands in a shell", Args: args(cobra.ExactArgs(1)),
		Long: `Prints a script that makes a shell complete commands, flags, volumes, snapshots
and mounts. Snapshots are asked of the store, which has 2 seconds to answer.

Load it for one session:

    source <(lazyvol completion bash)
    source <(lazyvol completion zsh)
    lazyvol completion fish | source

or for all, by writing it where the shell looks: see the examples. Bash needs its
package bash-completion, zsh that compinit was called.`,
		Example: `  lazyvol completion bash > /etc/bash_completion.d/lazyvol
  lazyvol completion zsh > /usr/share/zsh/site-functions/_lazyvol
  lazyvol completion fish > /usr/share/fish/vendor_completions.d/lazyvol.fish`,
		RunE: func(c *cobra.Command, args []string) error {
			switch root := c.Root(); args[0] {
			case "bash":
				return root.GenBashCompletionV2(a.stdout, true)
			case "zsh":
				return root.GenZshCompletion(a.stdout)
			case "fish":
				return root.GenFishCompletion(a.stdout, true)
			}
			return usageError{fmt.Errorf("no completions for %q: give bash, zsh or fish", args[0])}
		},
	}
}
